"""Examples of every command, for `--help` and the pages of reference."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "train-clip": ("train-clip demo/clip", "train-clip clip/vit-b-32 train.lr=1e-4 --dry-run"),
    "train-vae": ("train-vae demo/vae", "train-vae vae/emoji train.steps=2000 --out runs/emoji-vae"),
    "train-unet": (
        "train-unet demo/unet cache=data/demo/cache --nproc 2",
        "train-unet unet/sd15 train.micro_batch=8 --dry-run",
    ),
    "train-ar": ("train-ar demo/ar cache=data/demo/codes", "train-ar ar/llamagen-xl --dry-run"),
    "train-prior": ("train-prior prior/demo --max-time 30m", "train-prior prior/karlo --dry-run"),
    "precompute": ("precompute demo/unet --out data/demo/cache", "precompute demo/ar --out data/demo/codes"),
    "cascade": ("cascade cascade/demo", "cascade cascade/demo name=mine --out mine"),
    "sample": (
        'sample --model runs/demo-unet -p "a large green star" -n 4 --seed 7',
        "sample --repeat a.png --steps 100 --out again",
    ),
    "eval": ("eval demo/eval --out runs/demo-eval", "eval demo/eval 'eval.metrics=[reconstruction]'"),
    "compare": (
        "compare samples/coco val2014 --inception inception.safetensors",
        "compare runs/a/eval.json runs/b/eval.json",
    ),
    "report": ("report runs/demo-unet", "report runs/demo-clip runs/demo-unet --out all.html"),
    "convert": (
        "convert runs/demo-unet demo.safetensors --dtype fp16",
        "convert runs/demo-decoder demo-unclip --prior runs/demo-prior",
    ),
    "pull": (
        "pull stable-diffusion-v1-5/stable-diffusion-v1-5 --variant fp16",
        "pull openai/clip-vit-large-patch14@main --json",
    ),
    "spiral": ("spiral", "spiral --seed 1 --guidance 5 --out lesson"),
    "bench": ("bench train-unet --against diffusers", "bench sample --model runs/demo-unet -n 16"),
    "clip embed": (
        'clip embed "data/demo/train-*.tar" --model runs/demo-clip --out scenes.npy',
        "clip embed --texts a.txt --model runs/demo-clip --out texts.npy",
    ),
    "clip search": (
        'clip search scenes.npy --text "a blue star" --top 5',
        "clip search photos --model runs/demo-clip --like red.png --sheet found.png",
    ),
    "clip classify": ("clip classify photos --model runs/demo-clip --labels red,blue,green",),
    "clip tag": ('clip tag "data/demo/val-*.tar" --model runs/demo-clip --top 1',),
    "clip ask": ('clip ask a.png "which colour?" --model runs/demo-clip --answers red,blue',),
    "clip score": ('clip score "data/demo/val-*.tar" --model runs/demo-clip --sheet low.png',),
    "clip dedup": ("clip dedup scenes.npy --threshold 0.97 --out duplicates.jsonl",),
    "data synth": ("data synth data/demo --samples 20000", "data synth data/large --size 64 --only color=red"),
    "data pack": (
        "data pack photos data/photos --val-fraction 0.05",
        "data pack table.csv data/table --image-column file --caption-column text",
    ),
    "data check": (
        "data check data/photos",
        'data check "data/demo/train-*.tar" --duplicates duplicates.jsonl',
    ),
    "data stats": ('data stats "data/demo/train-*.tar"', "data stats data/photos caption=json:caption"),
    "data index": ('data index "data/demo/train-*.tar" --hash --sizes data/demo/sizes.json',),
    "recipe list": ("recipe list",),
    "recipe show": ("recipe show demo/clip", "recipe show demo/clip train.lr=1e-4 --resolved"),
    "recipe check": ("recipe check demo/clip demo/unet train.steps=100",),
    "recipe fields": ("recipe fields train-unet data.", "recipe fields sample sampling.guidance"),
    "recipe schema": ("recipe schema train-unet > train-unet.schema.json",),
}
"""By command, without `ldm`. A line fits into a screen of 80 columns."""


def epilog(command: str) -> str:
    """The examples of a command as the last lines of its help."""
    lines = [f"ldm {line}" for line in EXAMPLES[command]]
    return "\n\n".join(["Examples:", *(line.replace("[", r"\[") for line in lines)])
