import pytest
import torch
from PIL import Image

from ldm_cli.data.decode import from_pillow
from ldm_cli.errors import DataError, InputNotFoundError, UsageError
from ldm_cli.pictures.images import save_image
from ldm_cli.sampling.edit_config import EditConfig
from ldm_cli.sampling.edit_input import adain, latent_mask, open_edit_input


def picture(path, height, width, seed=0):
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    save_image(path, pixels)
    return pixels


def painted(path, height, width, top, left, bottom, right):
    mask = torch.zeros(3, height, width, dtype=torch.uint8)
    mask[:, top:bottom, left:right] = 255
    save_image(path, mask)
    return mask[0] > 0


def test_a_picture_of_any_size_is_padded_for_the_autoencoder_and_cut_again(tmp_path):
    pixels = picture(tmp_path / "a.png", 13, 18)
    edit_input = open_edit_input(EditConfig(image=str(tmp_path / "a.png")), 8, None)
    assert edit_input.pixels.shape == (3, 16, 24)
    assert torch.equal(edit_input.pixels[:, :13, :18], pixels)
    assert torch.equal(edit_input.pixels[:, 13:, :18], pixels[:, -1:].expand(3, 3, 18))
    assert edit_input.mask is None
    generated = torch.zeros_like(edit_input.pixels)
    assert torch.equal(edit_input.pasted(generated), generated[:, :13, :18])


def test_outside_of_the_mask_every_pixel_stays(tmp_path):
    pixels = picture(tmp_path / "a.png", 16, 16)
    mask = painted(tmp_path / "m.png", 16, 16, 3, 5, 9, 11)
    edit_input = open_edit_input(EditConfig(image=str(tmp_path / "a.png"), mask=str(tmp_path / "m.png")), 8, None)
    assert torch.equal(edit_input.mask, mask)
    result = edit_input.pasted(torch.full((3, 16, 16), 7, dtype=torch.uint8))
    assert torch.equal(result[:, ~mask], pixels[:, ~mask])
    assert bool((result[:, mask] == 7).all())


def test_extending_keeps_the_picture_in_its_place_and_draws_the_rest(tmp_path):
    pixels = picture(tmp_path / "a.png", 8, 8)
    painted(tmp_path / "m.png", 8, 8, 0, 0, 2, 2)
    edit = EditConfig(image=str(tmp_path / "a.png"), extend=(3, 4, 5, 6))
    edit_input = open_edit_input(edit, 8, None)
    assert edit_input.size == (18, 16)
    assert torch.equal(edit_input.pixels[:, 4:12, 3:11], pixels)
    outside = torch.ones(18, 16, dtype=torch.bool)
    outside[4:12, 3:11] = False
    assert torch.equal(edit_input.mask[:18, :16], outside)
    assert not edit_input.mask[18:].any(), "padding is not drawn"
    both = open_edit_input(edit.model_copy(update={"mask": str(tmp_path / "m.png")}), 8, None)
    outside[4:6, 3:5] = True
    assert torch.equal(both.mask[:18, :16], outside)


def test_a_size_is_filled_by_the_middle_of_the_picture_and_its_mask(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    image.save(tmp_path / "a.png")
    edit_input = open_edit_input(EditConfig(image=str(tmp_path / "a.png")), 8, (16, 16))
    assert edit_input.size == (16, 16)
    blue = from_pillow(Image.new("RGB", (16, 16), "blue"))[0]
    assert torch.equal(edit_input.pixels[:, :, 2:-2], blue[:, :, 2:-2])


def test_a_latent_is_drawn_if_any_of_its_pixels_is():
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[7, 8] = mask[15, 23] = True
    assert latent_mask(mask, 8)[0, 0].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_adain_gives_a_content_the_statistics_of_a_style():
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(1, 4, 8, 8, generator=generator) * 3 + 1
    style = torch.randn(1, 4, 6, 10, generator=generator) * 0.5 - 2
    styled = adain(content, style, 1.0)
    torch.testing.assert_close(styled.mean((2, 3)), style.mean((2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(styled.std((2, 3)), style.std((2, 3)), atol=1e-4, rtol=1e-4)
    assert torch.equal(adain(content, style, 0.0), content)


def test_pictures_that_cannot_be_used_are_named_with_their_option(tmp_path):
    picture(tmp_path / "a.png", 8, 8)
    painted(tmp_path / "small.png", 8, 9, 0, 0, 1, 1)
    painted(tmp_path / "black.png", 8, 8, 0, 0, 0, 0)
    (tmp_path / "text.png").write_text("no picture")
    image = str(tmp_path / "a.png")
    with pytest.raises(InputNotFoundError, match=r"none\.png.*--init"):
        open_edit_input(EditConfig(image=str(tmp_path / "none.png")), 8, None)
    with pytest.raises(DataError, match=r"text\.png.*--style"):
        open_edit_input(EditConfig(image=image, style=str(tmp_path / "text.png")), 8, None)
    with pytest.raises(UsageError, match=r"small\.png' is 9x8 px: its picture is 8x8"):
        open_edit_input(EditConfig(image=image, mask=str(tmp_path / "small.png")), 8, None)
    with pytest.raises(UsageError, match="all black"):
        open_edit_input(EditConfig(image=image, mask=str(tmp_path / "black.png")), 8, None)
    for fields in ({"mask": "m.png"}, {"strength": 0.5}, {"extend": (0, 0, 1, 0)}, {"style": "s.png"}):
        with pytest.raises(ValueError, match="without an image"):
            EditConfig(**fields)


def test_strength_is_that_of_the_kind_of_work_unless_it_is_given():
    assert EditConfig(image="a").resolved_strength == 0.8
    assert EditConfig(image="a", mask="m").resolved_strength == 1.0
    assert EditConfig(image="a", extend=(0, 0, 0, 1)).resolved_strength == 1.0
    assert EditConfig(image="a", mask="m", strength=0.0).resolved_strength == 0.0
