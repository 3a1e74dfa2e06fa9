"""The autoencoder with a codebook against diffusers: same folders, same numbers, same indices, same gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm_cli.core.codebook import codebook_loss, commitment_loss
from ldm_cli.core.models.vq_model import VQModel, straight_through
from ldm_cli.core.models.vq_model_config import VQModelConfig
from ldm_cli.errors import CheckpointError
from ldm_cli.families.codec_folder import open_codec
from ldm_cli.formats.model_folder import load_model
from ldm_cli.formats.save_model import save_model

diffusers = pytest.importorskip("diffusers")

PLAIN = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "num_vq_embeddings": 24,
    "norm_num_groups": 4,
    "vq_embed_dim": 6,
}
ATTENTIVE = PLAIN | {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "mid_block_add_attention": False,
    "vq_embed_dim": None,
    "lookup_from_codebook": True,
}


def spread(model: Any, seed: int = 0) -> Any:
    """The model with codes among the vectors that it quantizes, so that most of them are near some vector."""
    with torch.no_grad():
        z = model.quant_conv(model.encoder(images(seed, 8)))
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(vectors[:: len(vectors) // 24][:24])
    return model.eval()


def images(seed: int, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("fields", [PLAIN, ATTENTIVE], ids=["plain", "attentive"])
def test_their_folder_gives_their_numbers_and_indices_and_ours_is_theirs_again(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = spread(diffusers.VQModel(**fields))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = open_codec(tmp_path / "theirs").eval()
    assert isinstance(ours, VQModel)
    with torch.no_grad():
        z = theirs.encode(images(1)).latents
        indices = theirs.quantize(z)[2][2].view(3, 16, 16)
        assert (ours.encode_z(images(1)) - z).abs().max() <= 1e-6
        assert len(indices.unique()) > 12
        assert torch.equal(ours.encode_indices(images(1)), indices)
        assert torch.equal(ours.decode_indices(indices), ours.reconstruct(images(1)))
        assert torch.equal(ours.decode(ours.encode(images(1))), ours.reconstruct(images(1)))
        # The decoder's norms enlarge what rounds: with more digits the pictures are the same, too.
        whole = theirs.double()(images(1).double()).sample
        assert (ours.double().reconstruct(images(1)) - whole).abs().max() <= 1e-10
    save_model(tmp_path / "ours", ours.state_dict(), ours.config.to_hugging_face())
    again = diffusers.VQModel.from_pretrained(tmp_path / "ours").eval()
    assert again.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        assert (again.double()(images(1).double()).sample - whole).abs().max() <= 1e-10
    names = [json.loads((tmp_path / one / "config.json").read_text()).keys() for one in ("theirs", "ours")]
    assert names[0] - {"_name_or_path"} == names[1]


def test_all_tensors_of_the_published_layout_have_its_names_and_shapes() -> None:
    ours, theirs = VQModel(VQModelConfig.from_mapping(ATTENTIVE)), diffusers.VQModel(**ATTENTIVE)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_the_terms_have_the_gradients_of_diffusers_without_its_swap_of_beta() -> None:
    """Its `legacy` form, the default, gives β to the codebook's term; the paper's gives it to the commitment."""
    torch.manual_seed(0)
    ours = spread(VQModel(VQModelConfig.from_mapping(PLAIN)))
    for legacy, weights in ((False, (0.25, 1.0)), (True, (1.0, 0.25))):
        theirs = type(diffusers.VQModel(**PLAIN).quantize)(24, 6, beta=0.25, legacy=legacy)
        theirs.load_state_dict(ours.quantize.state_dict())
        z = ours.encode_z(images(2)).detach().requires_grad_()
        quantized, loss, _ = theirs(z)
        (loss + (quantized**2).mean()).backward()
        expected = [z.grad.clone(), theirs.embedding.weight.grad.clone()]

        z.grad = None
        ours.quantize.zero_grad()
        codes = ours.quantize.codes(ours.quantize.nearest(z))
        terms = weights[0] * commitment_loss(z, codes) + weights[1] * codebook_loss(z, codes)
        assert terms.item() == pytest.approx(loss.item(), rel=1e-6)
        (terms + (straight_through(z, codes) ** 2).mean()).backward()
        torch.testing.assert_close(z.grad, expected[0], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(ours.quantize.embedding.weight.grad, expected[1], rtol=1e-5, atol=1e-9)


def test_a_folder_with_another_codebook_or_a_norm_that_is_not_implemented_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VQModel(VQModelConfig.from_mapping(PLAIN))
    config = model.config.to_hugging_face()
    save_model(tmp_path / "size", model.state_dict(), config | {"num_vq_embeddings": 25})
    with pytest.raises(CheckpointError, match=r"quantize.embedding.weight is \[24, 6\], not \[25, 6\]"):
        load_model(VQModel, tmp_path / "size")
    save_model(tmp_path / "norm", model.state_dict(), config | {"norm_type": "spatial"})
    with pytest.raises(CheckpointError, match="norm_type"):
        open_codec(tmp_path / "norm")
    nn.init.constant_(model.quantize.embedding.weight, float("nan"))
    save_model(tmp_path / "nan", model.state_dict(), config)
    with pytest.raises(CheckpointError, match=r"not finite: quantize\.embedding\.weight"):
        open_codec(tmp_path / "nan")


def test_images_that_the_factor_does_not_divide_are_misuse() -> None:
    with pytest.raises(ValueError, match=r"33×32 px: not a multiple of factor=2"):
        VQModel(VQModelConfig.from_mapping(PLAIN)).encode_indices(F.pad(images(0), (0, 0, 0, 1)))
