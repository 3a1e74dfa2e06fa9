import stat

import torch
from PIL import Image

from ldm_cli.pictures.images import read_image, save_image, slug


def test_png_keeps_every_pixel_and_follows_the_umask(tmp_path):
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_image(tmp_path / "new" / "a.png", pixels, {"key": "é 猫"})
    assert torch.equal(read_image(tmp_path / "new" / "a.png"), pixels)
    (tmp_path / "plain").write_text("")
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "plain", tmp_path / "new" / "a.png")}
    assert len(modes) == 1
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.text["key"] == "é 猫"


def test_slugs_hold_nothing_but_letters_digits_and_hyphens():
    assert slug("A small RED circle / é") == "a-small-red-circle-e"
    assert slug("猫\x1b\n../") == "image"
    assert len(slug("word " * 1000)) <= 40
