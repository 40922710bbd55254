"""`gisting doctor`: it reports this environment, finds planted faults, and has no rules of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import gisting
from gisting import _compat, doctor
from gisting._compat import TESTED
from gisting.attention import api
from tests import tiny
from tests.repository import project


@pytest.fixture
def demo(demo_checkpoint: Path, tmp_path: Path) -> Path:
    """Copy what `gisting demo` leaves, for a test to damage."""
    return Path(shutil.copytree(demo_checkpoint, tmp_path / "demo"))


def by_name(findings: list[doctor.Finding], topic: str) -> dict[str, str]:
    return {found.name: found.value for found in findings if found.topic == topic}


def faults(findings: list[doctor.Finding]) -> list[tuple[str, str]]:
    return [(found.name, found.value) for found in findings if found.is_fault]


# -- this environment --------------------------------------------------------------------------------------------------


def test_this_environment() -> None:
    found = doctor.examine_here()
    assert faults(found) == []
    versions = by_name(found, "versions")
    assert versions["gisting"].startswith(gisting.__version__)
    assert versions["torch"].split()[0] in {torch.__version__, torch.__version__.partition("+")[0]}
    assert f"torch's threads: {torch.get_num_threads()}" in by_name(found, "devices")["cpu"]
    assert {"models from the hub", "compiled kernels"} <= set(by_name(found, "caches"))


def test_attention_is_asked_of_the_code_that_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(doctor.examine_here(), "attention")
    assert found["cpu, float32"].startswith("sdpa, agrees with the reference; not triton: the tensors are not on")
    assert {"cpu, float32", "cpu, bfloat16"} <= set(found)

    def choose(*args: object, **kwargs: object) -> tuple[str, str]:
        return "reference", "the moon is full"

    monkeypatch.setattr(api, "choose_implementation", choose)
    monkeypatch.setattr(doctor, "choose_implementation", choose)
    found = by_name(doctor.examine_here(), "attention")
    assert found["cpu, bfloat16"] == "reference, agrees with the reference; the moon is full"


def test_attention_that_is_wrong_is_a_fault(run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = api.sdpa_attention
    monkeypatch.setattr(api, "sdpa_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    found = doctor.examine_here()
    assert [name for name, _ in faults(found)] == ["cpu, float32", "cpu, bfloat16"]
    assert "differs from the reference by" in by_name(found, "attention")["cpu, float32"]
    done = run("doctor")
    assert done.code == 1
    assert "BROKEN: sdpa, differs from " in " ".join(done.out.split())
    assert f"error: 2 of {len(found)} findings here are faults" in done.err


def test_attention_that_fails_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel image is available\nand a page of help")

    monkeypatch.setattr(api, "sdpa_attention", fail)
    assert faults(doctor.examine_here())[0] == ("cpu, float32", "fails: no kernel image is available")


def test_every_extra_has_a_purpose_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(doctor.EXTRAS) == set(project()["optional-dependencies"]) - {"dev", "docs"}
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else installed(name))
    found = doctor.examine_here()
    assert "peft missing: pip install 'gist-tokens[train]' (" in by_name(found, "extras")["train"]
    assert faults(found) == [], "a missing optional package is not a fault"


def test_a_package_that_is_missing_or_old_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    installed, planted = doctor._version, {"tokenizers": None, "transformers": "4.57.1", "torch": "2.4.0+cpu"}
    monkeypatch.setattr(doctor, "_version", lambda name: planted[name] if name in planted else installed(name))
    found = doctor.examine_here()
    assert dict(faults(found)) == {
        "torch": "2.4.0+cpu, but gisting needs torch>=2.11; run: pip install 'torch>=2.11'",
        "transformers": "4.57.1, but gisting needs transformers>=5.17; run: pip install 'transformers>=5.17'",
        "tokenizers": "not installed; run: pip install 'tokenizers>=0.22'",
    }


def plant_package(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """Put the metadata of a package named gisting, with these files, where Python looks for packages."""
    about = folder / "gisting-1.3.6.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: gisting\nVersion: 1.3.6\n", encoding="utf-8")
    (about / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))


def test_the_package_with_the_same_import_name_is_a_fault(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_package(tmp_path, monkeypatch, "gisting/__init__.py", "gisting-1.3.6.dist-info/METADATA")
    ((name, value),) = faults(doctor.examine_here())
    assert name == "package named gisting"
    assert value.startswith("1.3.6, an unrelated package with the same import name")
    assert value.endswith("pip uninstall -y gisting && pip install --force-reinstall --no-deps gist-tokens")
    done = run("doctor")
    assert done.code == 1
    assert "an unrelated package" in " ".join(done.out.split())


def test_an_editable_install_under_the_former_name_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a clone of this repository, and has no files that another package could overwrite."""
    plant_package(tmp_path, monkeypatch, "__editable__.gisting-1.3.6.pth", "gisting-1.3.6.dist-info/METADATA")
    assert faults(doctor.examine_here()) == []


def test_a_python_that_is_old_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.14")
    assert faults(doctor.examine_here()) == [
        ("python", "3.10.14, but gisting needs python>=3.11; run gisting with a newer Python")
    ]


def test_a_version_outside_those_that_were_tested_is_noted(run, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._version
    planted = {"python": "3.14.1", "torch": "2.99.0+cu130", "transformers": "5.99.0.dev0", "triton": "3.99"}
    monkeypatch.setattr(doctor, "_version", lambda name: planted[name] if name in planted else installed(name))
    found = doctor.examine_here()
    versions = by_name(found, "versions")
    newest = {name: max((row[name] for row in TESTED.values()), key=Version) for name in planted}
    for name in ("python", "torch", "transformers"):
        assert versions[name] == f"{planted[name]} (newer than {newest[name]}, the newest that was tested)"
    assert f"triton 3.99 (newer than {newest['triton']}, the newest" in by_name(found, "extras")["kernels"]
    assert faults(found) == [], "an untested version may work"
    assert "the newest that was tested" in " ".join(run("doctor").out.split())


@pytest.mark.parametrize(
    ("package", "version", "note"),
    [
        ("torch", "2.12.0", None),
        ("torch", "2.13.0+cu130", None),
        ("torch", "2.13.0.dev1", None),
        ("torch", "2.13.1", "newer than 2.13.0, the newest that was tested"),
        ("torch", "2.10.9+cpu", "older than 2.11.0, the oldest that was tested"),
        ("torch", "2.9", "older than 2.11.0, the oldest that was tested"),
        ("python", "3.12.99", None),
        ("python", "3.13.0rc1", "newer than 3.12, the newest that was tested"),
        ("python", "3.9.1", "older than 3.11, the oldest that was tested"),
        ("numpy", "99", None),
    ],
)
def test_untested(monkeypatch: pytest.MonkeyPatch, package: str, version: str, note: str | None) -> None:
    rows = {"CI": {"python": "3.11", "torch": "2.13.0"}, "H100": {"python": "3.12", "torch": "2.11.0"}}
    monkeypatch.setattr(_compat, "TESTED", rows)
    assert _compat.untested(package, version) == note


def test_a_triton_that_is_old_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is optional, but on a CUDA device the kernels are used by default."""
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "3.5.1" if name == "triton" else installed(name))
    ((name, value),) = faults(doctor.examine_here())
    assert (name, value.partition(" (attention")[0]) == ("kernels", "triton 3.5.1 (gisting needs triton>=3.6)")


def test_an_optional_package_that_is_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1" if name == "peft" else installed(name))
    found = doctor.examine_here()
    assert re.search(r"peft 0\.1 \(gisting needs peft>=[\d.]+\)", by_name(found, "extras")["train"])
    assert faults(found) == []


# -- a path ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint(demo: Path) -> None:
    found = doctor.examine_path(demo)
    assert faults(found) == []
    told = by_name(found, "checkpoint")
    _, tokenizer = gisting.load(demo)
    assert told["family"] == "llama, up to 256 positions"
    assert told["gists"].startswith("exact, as checked with torch ")
    assert told["tokenizer"] == tokenizer.fingerprint
    assert told["gist token"] == f"id {tokenizer.gist_token_id}"
    assert told["template"] == "letters"
    assert told["gist tokens trained"] == "2"
    assert told["weights"].endswith(f"{(demo / 'model.safetensors').stat().st_size:,} bytes")
    assert "cpu, float32" in by_name(found, "attention")


def test_a_checkpoint_that_was_not_patched(tmp_path: Path) -> None:
    tiny.model("gemma2").save_pretrained(tmp_path)
    tiny.word_tokenizer().save_pretrained(tmp_path)
    found = doctor.examine_path(tmp_path)
    assert faults(found) == []
    told = by_name(found, "checkpoint")
    assert told["gist token"].startswith("none: ")
    assert told["gists: mask"].startswith("mask passed, states and logits of 2 rows of prompt, gist and rest, ")
    chosen = by_name(found, "attention")["cpu, float32"]
    assert chosen.startswith("reference, agrees with the reference; there is a softcap"), "as the model would be run"


@pytest.mark.parametrize(
    ("kind", "file"), [("lora", "adapter_model.safetensors"), ("gist-lora", "gist_adapter.safetensors")]
)
def test_an_adapter(tmp_path: Path, kind: str, file: str) -> None:
    from gisting.models import adapters

    tiny.model("llama").save_pretrained(tmp_path / "base")
    tiny.word_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = gisting.load(tmp_path / "base", "plain")
    adapters.attach(model, adapters.Adapter(kind))
    adapters.save(model, tokenizer, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = doctor.examine_path(tmp_path / "adapter")
    assert faults(found) == []
    assert by_name(found, "checkpoint")["adapter of"] == str(tmp_path / "base")
    (tmp_path / "adapter" / file).unlink()
    assert [name for name, _ in faults(doctor.examine_path(tmp_path / "adapter"))] == ["weights"]


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def other_template(path: Path) -> None:
    template = json.loads(path.read_text(encoding="utf-8"))["template"]
    changed(path, template={**template, "prompt": "do: {prompt}"})


def eos_dropped(path: Path) -> None:
    state = json.loads(path.read_text(encoding="utf-8"))
    del state["eos_token"]
    path.write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize(
    ("plant", "name", "message"),
    [
        (
            lambda folder: changed(folder / "config.json", model_type="mamba"),
            "family",
            "mamba has layers of type linear_attention",
        ),
        (lambda folder: changed(folder / "config.json", vocab_size=3), "gist token", "but the model has 3 rows"),
        (lambda folder: other_template(folder / "gist.json"), "tokenizer", "the model was patched for "),
        (lambda folder: eos_dropped(folder / "tokenizer_config.json"), "tokenizer", "has no eos_token"),
        (lambda folder: changed(folder / "config.json", gist=3), "configuration", "config.json is damaged"),
        (lambda folder: (folder / "gist.json").unlink(), "tokenizer", "has no gist.json"),
        (lambda folder: (folder / "gist.json").write_text("{"), "tokenizer", "gist.json"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "configuration",
            "is not a readable checkpoint, store or ",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights", "model.safetensors is missing or damaged"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]),
            "weights",
            "model.safetensors is missing or damaged",
        ),
    ],
)
def test_what_is_wrong_with_a_checkpoint(run, demo: Path, plant, name: str, message: str) -> None:
    plant(demo)
    found = faults(doctor.examine_path(demo))
    ((value),) = [value for where, value in found if where == name]
    assert message in value
    if (name, len(found)) != ("gist token", 2):  # There the embedding has other rows than the configuration says.
        assert len(found) == 1
    done = run("doctor", demo, "--json")
    assert done.code == 1
    assert [row["value"] for row in map(json.loads, done.out.splitlines()) if row["is_fault"]] == [
        value for _, value in found
    ]


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert faults(doctor.examine_path(tmp_path)) == []
    shards[1].unlink()
    ((name, value),) = faults(doctor.examine_path(tmp_path))
    assert (name, value.split()[0]) == ("weights", shards[1].name)


def test_a_cache_file(demo: Path) -> None:
    file = demo / "gists" / "instruction.gist.safetensors"
    found = doctor.examine_path(file)
    assert by_name(found, "cache file")["prompts"] == "1, with 2 gist tokens"
    made_by = "model llama/[0-9a-f]{12}, tokenizer [0-9a-f]{12}"
    assert re.fullmatch(made_by, by_name(found, "cache file")["made by"]), "the demo's model was never loaded"
    assert faults(found) == []
    loaded, tokenizer = gisting.load(demo)
    gisting.compress(loaded, tokenizer, ["answer plainly"], 2).save(demo / "gists" / "named.safetensors")
    named = by_name(doctor.examine_path(demo / "gists" / "named.safetensors"), "cache file")["made by"]
    assert re.fullmatch(f"{demo.parent.name}/{demo.name}, {made_by}", named)
    file.write_bytes(file.read_bytes().replace(b"llama/", b"lloma/"))
    ((_, value),) = faults(doctor.examine_path(file))
    assert "is altered" in value


def test_a_store(demo: Path, tmp_path: Path) -> None:
    model, tokenizer = gisting.load(demo)
    store = gisting.GistStore(tmp_path / "gists")
    store.get_or_compress(model, tokenizer, ["answer plainly", "write capitals"], 2, names=["a", "b"])
    store.close()
    found = doctor.examine_path(tmp_path / "gists")
    assert by_name(found, "store")["files"] == "all intact"
    assert by_name(found, "store")["entries"].startswith("2, in files of ")
    made_by = rf"{demo.parent.name}/{demo.name}, model llama/[0-9a-f]{{12}}: 2 of \d{{4}}-\d\d-\d\d: 'a', 'b'"
    assert re.fullmatch(made_by, by_name(found, "store")["made by"])
    file = sorted((tmp_path / "gists" / "objects").glob("*/*"))[0]
    orphan = tmp_path / "gists" / "objects" / "00" / ("0" * 64 + ".gist.safetensors")
    orphan.parent.mkdir(exist_ok=True)
    shutil.copy(file, orphan)
    file.write_bytes(file.read_bytes()[:-1])
    told = doctor.examine_path(tmp_path / "gists")
    assert [name for name, _ in faults(told)] == ["torn"]
    assert "gisting store gc deletes it" in by_name(told, "store")["orphan"]


def test_what_is_not_there(run, tmp_path: Path) -> None:
    ((name, value),) = faults(doctor.examine_path(tmp_path / "nothing"))
    assert name == "configuration"
    assert f"{tmp_path / 'nothing'} is not a readable checkpoint, store or cache file: " in value
    done = run("doctor", tmp_path / "nothing")
    assert done.code == 1
    assert done.err == f"error: 1 of 1 findings in {tmp_path / 'nothing'} are faults\n"
