"""Oracles for finding a model: paths, runs and Hub ids; what a folder holds; and parts that are whole or refused."""

import fnmatch
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch

from models import hub
from models.hub import ADAPTER_FILES, PEFT_FILES, TRANSFORMER_FILES, ModelError
from models.load import BASE_FILES
from tests.helpers.checks import refusal


@pytest.fixture(scope="module")
def base(folders):
    return folders["sd35"]


@pytest.fixture
def adapter(tmp_path):
    """A folder with the files of an adapter in both layouts; nothing here reads what is in them."""
    (tmp_path / "lora").mkdir()
    for name in ADAPTER_FILES:
        (tmp_path / "lora" / name).write_text("{}")
    return tmp_path / "lora"


# ------------------------------------------------------------------------------------------------------ locations
@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """A Hub that writes down what is asked of it, and answers with `fetched.answer`, a folder or an exception."""
    found = SimpleNamespace(calls=[], answer=AssertionError("nothing may be fetched here"))

    def snapshot_download(repo, **options):
        found.calls.append((repo, options))
        if isinstance(found.answer, Exception):
            raise found.answer
        return [] if options.get("dry_run") else str(found.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


def test_folders_files_and_home_paths_are_themselves(fetched, adapter, tmp_path, monkeypatch):
    assert hub.locate(str(adapter)) == hub.locate(adapter) == adapter
    assert hub.locate("lora") == Path("lora"), "relative, and it exists"
    for name in ADAPTER_FILES:
        assert hub.locate(str(adapter / name)) == adapter
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.locate("~/lora") == adapter
    (tmp_path / "notes.txt").write_text("")
    assert "notes.txt" in refusal(hub.locate, str(tmp_path / "notes.txt"))
    assert fetched.calls == []


def test_a_run_stands_for_its_last_complete_checkpoint(fetched, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    assert hub.last_checkpoint(tmp_path / "run") is None and hub.last_checkpoint(tmp_path / "none") is None
    (checkpoints / ".step-000003").mkdir()
    assert hub.last_checkpoint(tmp_path / "run") is None, "it is being written"
    for name in ("step-000002", "step-000010", "step-000010.old", "step-999999", "step-1000000"):
        (checkpoints / name).mkdir()
    assert hub.locate("run") == Path("run/checkpoints/step-1000000"), "by number, not by letter"
    assert hub.locate("run/checkpoints/step-000002") == Path("run/checkpoints/step-000002")


LOCAL = ["./a/b", "../a/b", "~/a/b", "/a/b", "a/b.safetensors", "a/b.bin", "here/b", "single", "", "a//b", "a/../b",
         "a b/c"]  # fmt: skip


@pytest.mark.parametrize("where", LOCAL)
def test_a_missing_path_is_an_error_and_never_a_download(fetched, tmp_path, where):
    (tmp_path / "here").mkdir()
    assert where in refusal(hub.locate, where) and fetched.calls == []


IDS = {
    "jieliu/SD3.5M-FlowGRPO-GenEval": ("jieliu/SD3.5M-FlowGRPO-GenEval", "", None),
    "stabilityai/stable-diffusion-3.5-medium@v1.0": ("stabilityai/stable-diffusion-3.5-medium", "", "v1.0"),
    "CostaliyA/Flow-OPD/a/b.2": ("CostaliyA/Flow-OPD", "a/b.2/", None),
    "owner/name/sub@refs/pr/1": ("owner/name", "sub/", "refs/pr/1"),
}


@pytest.mark.parametrize("where", IDS)
def test_a_hub_id_is_fetched_with_what_an_expert_may_be_and_no_pickles(fetched, adapter, where):
    repo, inside, revision = IDS[where]
    fetched.answer = adapter.parent / "snapshot"
    shutil.copytree(adapter, fetched.answer / inside)
    assert hub.locate(where) == fetched.answer / inside
    ((asked, options),) = fetched.calls
    assert asked == repo == hub.hub_id(where) and options["revision"] == revision
    assert options["allow_patterns"] == [inside + name for name in (*ADAPTER_FILES, *TRANSFORMER_FILES)]
    assert {"*.bin", "*.pt", "*.pkl", "*.ckpt"} <= set(options["ignore_patterns"])
    assert hub.base_and_revision(where) == ((where.split("@")[0], revision) if revision else (where, ""))


@pytest.mark.parametrize("inside", ["", "styles/"])
def test_a_hub_id_is_read_like_a_folder_whatever_its_lora_is_called(monkeypatch, tmp_path, adapter, inside):
    """In a real cache, without a network; pictures and a base beside it are none of its files."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache/models--owner--name"
    file = repo / f"snapshots/{'0' * 40}/{inside}my_style_1500.safetensors"
    for path, text in ((repo / "refs/main", "0" * 40), (file.parent / "notes/x.safetensors", ""), (file, "")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    safetensors.torch.save_file({"x.lora_A.weight": torch.ones(1)}, file)
    for where, found in ((f"owner/name/{inside}", file.parent), (f"owner/name/{inside}{file.name}", file)):
        assert hub.locate(where.strip("/")) == found
        assert hub.lora_file(found) == file and hub.kind(found) == "file"
    assert "other.safetensors" in refusal(hub.locate, f"owner/name/{inside}other.safetensors")
    assert "owner/name" in refusal(hub.locate, "owner/name", ("vae/*.json",)), "a base has no files of any name"


def test_of_several_loras_on_the_hub_none_is_fetched_and_one_is_named(fetched, monkeypatch, tmp_path):
    def snapshot_download(repo, allow_patterns, dry_run=False, **_):
        assert dry_run or "*.safetensors" not in allow_patterns
        return [SimpleNamespace(filename=f"d/{n}.safetensors") for n in "ab"] if dry_run else str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "as owner/name/d/b.safetensors" in refusal(hub.locate, "owner/name/d")


def test_other_files_are_fetched_on_request_and_a_repository_without_them_is_refused(fetched, base):
    fetched.answer = base
    assert hub.locate("owner/name", ("vae/*.json",)) == base
    assert fetched.calls[-1][1]["allow_patterns"] == ["vae/*.json"]
    assert hub.locate("owner/name") == base, "a full checkpoint is an expert too"
    fetched.answer = base / "tokenizer"
    assert "owner/name" in refusal(hub.locate, "owner/name")


@pytest.mark.parametrize("fault", [OSError("404 Client Error.\n\nRepository Not Found\n"), TimeoutError()])
def test_what_the_hub_refuses_is_said_in_its_own_words_on_one_line(fetched, fault):
    fetched.answer = fault
    said = refusal(hub.locate, "o/n@r1")
    assert said.startswith("o/n@r1: ") and (" ".join(str(fault).split()) or "TimeoutError") in said


def test_what_is_fetched_of_a_base_is_what_a_run_needs_and_no_more(folders):
    """Names of the published repositories' files: the right ones match, copies and pickles do not."""

    def wanted(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in BASE_FILES)  # as the Hub's client filters

    for folder in (folders["sd35"], folders["plus"]):
        for file in map(str, (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())):
            assert wanted(file) == ("generation_config" not in file), file
    for name in ("text_encoder_3/model-00001-of-00002.safetensors", "vae/config.json", "tokenizer_3/spiece.model",
                 "transformer/diffusion_pytorch_model-00009-of-00009.safetensors", "processor/tokenizer.json",
                 "transformer/diffusion_pytorch_model.safetensors.index.json"):  # fmt: skip
        assert wanted(name), name
    for name in ("sd3.5_medium.safetensors", "text_encoders/t5xxl_fp8_e4m3fn.safetensors", "README.md",
                 "text_encoder/model.fp16.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors",
                 "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.bin"):  # fmt: skip
        assert not wanted(name), name


# --------------------------------------------------------------------------------------------------- what is there
def test_folders_are_told_apart_by_what_they_hold_and_pefts_layout_comes_first(base, adapter):
    assert hub.kind(adapter) == hub.kind(str(adapter)) == "peft"
    (adapter / PEFT_FILES[0]).unlink()
    assert hub.kind(adapter) == "file", "half a PEFT adapter does not count"
    assert hub.kind(base) == hub.kind(base / "transformer") == "full"


def test_the_fingerprint_is_the_hash_of_small_files_and_of_the_two_ends_of_large_ones(tmp_path):
    for name, text in (("b", b"two"), ("a", b"one")):
        (tmp_path / f"{name}.safetensors").write_bytes(text)
    (tmp_path / "config.json").write_text("{}")
    assert hub.fingerprint(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()[:16], "in the order of the names"
    size, edge = 17 << 20, 8 << 20
    content = bytearray(torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes())
    (tmp_path / "large").mkdir()
    file = tmp_path / "large" / "x.safetensors"
    file.write_bytes(content)
    whole = hub.fingerprint(tmp_path / "large")
    assert whole == hashlib.sha256(content[:edge] + content[-edge:]).hexdigest()[:16]
    for place, changes in ((0, True), (edge - 1, True), (edge + 7, False), (size - edge, True), (size - 1, True)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert (hub.fingerprint(tmp_path / "large") != whole) == changes, place


# ------------------------------------------------------------------------------------------------------------ parts
def test_only_what_changes_the_function_makes_another_architecture(base, tmp_path):
    read = hub.read_transformer(base, torch.float32)
    same = {**read.config, "sample_size": 999, "_name_or_path": "elsewhere", "unknown": 1}
    assert hub.read_transformer(base, torch.float32, same)
    said = refusal(hub.read_transformer, base, torch.float32, {**read.config, "num_layers": 5})
    assert "num_layers" in said and str(base) in said
    with pytest.raises(ModelError):
        hub.read_transformer(base, torch.float32, {"_class_name": "QwenImageTransformer2DModel"})
