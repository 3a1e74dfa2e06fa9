"""The names that other programs have for samplers: web interfaces, kohya's scripts, k-diffusion, diffusers."""

from __future__ import annotations

import re
from typing import get_args

from ldm_cli.sampling.config import SamplerName

_SCHEDULES = ("karras", "exponential")
# Without the marks, prefixes and suffixes that `_plain` removes.
_OTHER_NAMES = {
    "eulera": "euler_ancestral",
    "dpmpp2sa": "dpmpp_2s_ancestral",
    "dpmpp2s": "dpmpp_2s_ancestral",
    "dpmpp3m": "dpmpp_3m_sde",
    "dpmsolver": "dpmpp_2m",
    "dpmsolverpp": "dpmpp_2m",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmsingle": "dpmpp_2s_ancestral",
    "dpmsolversinglestep": "dpmpp_2s_ancestral",
    "dpmsolversde": "dpmpp_sde",
    "kdpm2": "dpm2",
    "unipcmultistep": "unipc",
    "unipcbh2": "unipc",
    "plms": "pndm",
    "flowmatcheuler": "flow_euler",
    "flowmatchheun": "flow_heun",
}


def sampler_called(name: str) -> SamplerName | None:
    """Our name of the sampler that another program calls `name`, in any spelling; None if there is none.

    >>> [sampler_called(name) for name in ("DPM++ 2M SDE Karras", "k_euler_a", "EulerDiscreteScheduler", "res_2s")]
    ['dpmpp_2m_sde', 'euler_ancestral', 'euler', None]
    """
    plain = _plain(name)
    known: dict[str, SamplerName] = {_plain(sampler): sampler for sampler in get_args(SamplerName)}
    return known.get(_OTHER_NAMES.get(plain, plain).replace("_", ""))


def schedule_called(name: str) -> str | None:
    """The timestep spacing that is part of another program's name of a sampler, as in `DPM++ 2M Karras`."""
    return next((schedule for schedule in _SCHEDULES if name.lower().endswith(schedule)), None)


def _plain(name: str) -> str:
    """Lower-case letters and digits, without the words that programs put around a sampler's name."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
    plain = re.sub(rf"^(sample|k(?=euler|heun|lms|dpm2|dpmpp))|({'|'.join(_SCHEDULES)}|gpu|scheduler)$", "", plain)
    return plain.removesuffix("discrete")
