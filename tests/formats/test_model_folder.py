import json
import os
import pickle
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ldm_cli.errors import CheckpointError, InputNotFoundError, OutputError, StorageError
from ldm_cli.formats.model_folder import load_model, load_weights, read_config
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, weight_files
from ldm_cli.formats.weight_values import expect_finite


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def named(**layers):
    module = nn.Module()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_saved_weights_come_back_bit_for_bit_and_follow_the_umask(tmp_path):
    ours, theirs = network(0), network(1)
    save_model(tmp_path / "new" / "folder", ours.state_dict(), {"_class_name": "X"})
    folder = tmp_path / "new" / "folder"
    load_weights(theirs, folder)
    assert same(ours, theirs)
    assert read_config(folder) == {"_class_name": "X"}
    (tmp_path / "plain").write_text("")
    mode = (tmp_path / "plain").stat().st_mode
    assert {p.name for p in folder.iterdir()} == {"config.json", DIFFUSERS_WEIGHTS}
    assert all(stat.S_IMODE(p.stat().st_mode) == stat.S_IMODE(mode) for p in folder.iterdir())


def test_file_is_float32_contiguous_marked_pt_and_free_of_wrappers(tmp_path):
    transposed = torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3).T
    state = {"module.a._orig_mod.weight": transposed, "_fsdp_wrapped_module.count": torch.tensor(3)}
    save_model(tmp_path, state, {}, TRANSFORMERS_WEIGHTS)
    tensors = load_file(tmp_path / TRANSFORMERS_WEIGHTS)
    assert set(tensors) == {"a.weight", "count"}
    assert tensors["a.weight"].dtype == torch.float32
    assert torch.equal(tensors["a.weight"], transposed.float())
    assert tensors["count"].dtype == torch.int64
    data = (tmp_path / TRANSFORMERS_WEIGHTS).read_bytes()
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"] == {"format": "pt"}


def test_failed_save_leaves_the_old_files_and_nothing_temporary(tmp_path, monkeypatch):
    def fill_the_disk(tensors, path, metadata):
        path.write_bytes(b"part")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    save_model(tmp_path, network(0).state_dict(), {})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr("ldm_cli.formats.weight_files.save_file", fill_the_disk)
    with pytest.raises(StorageError, match=r"No space left on device \([\d.]+ [MGT]iB are free\)"):
        save_model(tmp_path, network(1).state_dict(), {})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_model(tmp_path / "file" / "folder", {}, {})


@pytest.mark.parametrize("names", ["plain", "fp16", "sharded", "sharded fp16"])
def test_every_arrangement_of_files_is_read(tmp_path, names):
    ours, theirs = network(0), network(1)
    state = ours.state_dict()
    stem, infix = "diffusion_pytorch_model", ".fp16" if "fp16" in names else ""
    if "sharded" in names:
        halves = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
        files = [f"{stem}{infix}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (tmp_path / f"{stem}.safetensors.index{infix}.json").write_text(json.dumps({"weight_map": weight_map}))
        for file, half in zip(files, halves, strict=True):
            save_file(half, tmp_path / file)
    else:
        save_file(state, tmp_path / f"{stem}{infix}.safetensors")
    load_weights(theirs, tmp_path)
    assert same(ours, theirs)


def test_missing_shard_and_index_that_leads_out_of_the_folder_are_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(InputNotFoundError, match=r"model-1\.safetensors"):
        load_weights(network(), tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    with pytest.raises(CheckpointError, match="out of the folder"):
        load_weights(network(), tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        load_weights(network(), tmp_path)


def test_half_precision_files_fill_a_float32_module_and_meta_modules_become_float32(tmp_path):
    save_file({k: v.half() if v.is_floating_point() else v for k, v in network().state_dict().items()},
              tmp_path / "model.safetensors")  # fmt: skip
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for module in (network(1), meta):
        load_weights(module, tmp_path)
        assert module[0].weight.dtype == torch.float32
        assert module[0].weight.device.type == "cpu"
        assert torch.equal(module[0].weight, network()[0].weight.half().float())


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"layer": nn.Linear(2, 2)}, {"text_model": named(layer=nn.Linear(2, 2))}),
        ({"text_model": named(layer=nn.Linear(2, 2))}, {"layer": nn.Linear(2, 2)}),
        (
            {"attention": named(query=nn.Linear(2, 2), key=nn.Linear(2, 2), value=nn.Linear(2, 2))},
            {"attention": named(to_q=nn.Linear(2, 2), to_k=nn.Linear(2, 2), to_v=nn.Linear(2, 2))},
        ),
        ({"a": named(proj_attn=nn.Linear(2, 2))}, {"a": named(to_out=nn.ModuleList([nn.Linear(2, 2)]))}),
    ],
    ids=["prefix missing", "prefix too much", "old query, key, value", "old projection"],
)
def test_other_spellings_of_names_are_understood(tmp_path, written, read):
    ours, theirs = named(**written), named(**read)
    extra = {"text_model.embeddings.position_ids": torch.arange(3)}
    save_file({**ours.state_dict(), **extra}, tmp_path / "model.safetensors")
    load_weights(theirs, tmp_path)
    assert same(ours, theirs)


def test_of_two_spellings_of_one_name_the_other_one_is_left_over(tmp_path):
    layer = nn.Linear(2, 2)
    state = {"layer.weight": layer.weight + 1, "layer.bias": layer.bias, "text_model.layer.weight": layer.weight}
    for names in (state, reversed(state)):
        save_file({name: state[name].detach() for name in names}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"unexpected: text_model\.layer\.weight"):
            load_weights(named(layer=nn.Linear(2, 2)), tmp_path)


def test_misfits_are_named_up_to_five(tmp_path):
    save_file({"0.weight": torch.ones(4, 3), **{f"extra{i}": torch.zeros(1) for i in range(7)}},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        load_weights(nn.Sequential(nn.Linear(5, 4)), tmp_path)
    text = str(caught.value)
    assert "missing: 0.bias" in text
    assert "0.weight is [4, 3], not [4, 5]" in text
    assert "extra0, extra1, extra2, extra3, extra4 and 2 more" in text
    assert "extra5" not in text
    load_weights(nn.Sequential(nn.Linear(3, 4, bias=False)), tmp_path, allow_extra=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    state = network().state_dict()
    state["2.weight"][1, 2] = value
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite: 2\.weight"):
        load_weights(network(), tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_pickles_are_refused_by_content_and_by_name_and_never_executed(tmp_path):
    content = pickle.dumps(Bomb())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="pickle"):
        load_weights(network(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pickle"):
        load_weights(network(), tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="pickle"):
        load_weights(network(), tmp_path)


def test_truncated_overlapping_and_undownloaded_files_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(network().state_dict(), file)
    whole = file.read_bytes()
    for size in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            load_weights(network(), tmp_path)
    header = json.dumps({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(network(), tmp_path)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(CheckpointError, match="Git LFS"):
        load_weights(network(), tmp_path)


def test_missing_folders_and_files_are_inputs_not_found(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputNotFoundError):
            load_weights(network(), folder)
        with pytest.raises(InputNotFoundError):
            read_config(folder)
    for content in (b"[1]", b"{", b"\xff"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError):
            read_config(tmp_path)


def test_model_is_made_of_its_configuration_and_problems_with_it_name_the_file(tmp_path):
    def parse(mapping):
        if "size" not in mapping:
            raise ValueError("size is missing")
        return mapping["size"]

    class Layer(nn.Linear):
        config_class = SimpleNamespace(from_hugging_face=parse)

        def __init__(self, size):
            super().__init__(size, size)

    layer = Layer(3)
    save_model(tmp_path, layer.state_dict(), {"size": 3})
    assert same(load_model(Layer, tmp_path), layer)
    save_model(tmp_path, layer.state_dict(), {})
    with pytest.raises(CheckpointError, match=r"config\.json.*size is missing"):
        load_model(Layer, tmp_path)
    assert same(load_model(Layer, tmp_path, parse=lambda mapping: 3), layer)


def test_hash_of_weights_ignores_the_header_and_sees_every_byte_of_data(tmp_path):
    state = {"a": torch.arange(4.0), "b": torch.ones(2)}
    hashes = []
    for i, metadata in enumerate([{"format": "pt"}, {"format": "pt", "note": "x" * 99}]):
        (tmp_path / str(i)).mkdir()
        save_file(state, tmp_path / str(i) / "model.safetensors", metadata)
        hashes.append(weights_sha256(tmp_path / str(i)))
    assert hashes[0] == hashes[1]
    file = tmp_path / "0" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert weights_sha256(tmp_path / "0") != hashes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype, value, tmp_path):
    for place in (0, 500, 998):
        tensors = {"x": torch.randn(999).to(dtype), "empty": torch.zeros(0), "count": torch.tensor(3)}
        expect_finite(tensors, tmp_path)
        tensors["x"][place] = value
        with pytest.raises(CheckpointError, match="not finite: x"):
            expect_finite(tensors, tmp_path)


_MEASURED_READING = """
import re, sys
from pathlib import Path
import torch
from torch import nn
from ldm_cli.formats.model_folder import load_weights, without_weights

def memory(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

with without_weights():
    module = nn.Sequential(*(nn.Linear(4000, 4000, bias=False) for _ in range(4)))
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
load_weights(module, Path(sys.argv[1]), dtype=torch.bfloat16)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be reset")
def test_a_model_is_read_without_room_for_its_file(tmp_path):
    save_file({f"{i}.weight": torch.ones(4000, 4000) for i in range(4)}, tmp_path / "model.safetensors")
    # A process of its own: this one has free memory, which would hide the peak.
    command = [sys.executable, "-c", _MEASURED_READING, str(tmp_path)]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    own, one = 2 * 4 * 4000**2, 4 * 4000**2
    assert own <= peak <= own + 1.25 * one


def test_weights_that_are_looked_for_one_folder_too_high_are_pointed_at(tmp_path):
    (tmp_path / "run/model").mkdir(parents=True)
    with pytest.raises(InputNotFoundError, match=rf"no weights in '{tmp_path}/run': .*; give '{tmp_path}/run/model'"):
        weight_files(tmp_path / "run")
    with pytest.raises(InputNotFoundError, match=r"model '.*none' not found; check the path"):
        weight_files(tmp_path / "none")
