#!/bin/sh
# Run an ldm command again for as long as it ends with 75: stopped, and the same command goes on.
#
#   scripts/until_done.sh train-unet unet/sd15 --max-time 3h
#
# For a queue without requeueing, and for cron, whose next start goes on where a reboot ended the last one:
#
#   */10 * * * * cd /home/me/project && scripts/until_done.sh train-unet unet/sd15 --out runs/sd15 >> sd15.log 2>&1
#
# A second start of a run that is under way ends with 73, and one of a finished run with 0, so that the line may stay.
# Use --max-time rather than timeout(1): it ends at a step. If it must be timeout, `timeout --preserve-status 3h ldm ...`
# keeps the code 75; without that option it is 124.
set -u
stop() {
  kill -TERM "$child" 2>/dev/null
  stopped=1
}
stopped=0
trap stop TERM INT
while :; do
  ldm "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal ends wait, not ldm
    wait "$child"
    code=$?
  done
  [ "$code" -eq 75 ] && [ "$stopped" -eq 0 ] || exit "$code"
done
