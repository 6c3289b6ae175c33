from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from fedtt.errors import BundleError
from fedtt.manifest import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    bundle_digest,
    decode_manifest,
    encode_manifest,
)
from tests.support.tiny import tiny_manifest, tiny_spec

Tree = dict[str, Any]


def refusal(data: bytes) -> str:
    """The one line with which a manifest is refused."""
    with pytest.raises(BundleError) as error:
        decode_manifest(data, "bundle/manifest.json")
    assert str(error.value).startswith("bundle/manifest.json ")
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(change: Callable[[Tree], object]) -> bytes:
    """The tiny manifest with something wrong in it."""
    tree: Tree = msgspec.json.decode(encode_manifest(tiny_manifest()))
    change(tree)
    return msgspec.json.encode(tree)


def test_a_manifest_comes_back_as_it_went_and_its_bytes_are_canonical() -> None:
    data = encode_manifest(tiny_manifest())
    assert decode_manifest(data) == tiny_manifest()
    assert encode_manifest(decode_manifest(data)) == data
    assert data.startswith(b'{\n  "format": 3,\n  "task": "sequence-classification"')
    assert data.endswith(b"}\n")


def test_a_bundles_name_is_the_hash_of_its_manifest() -> None:
    data = encode_manifest(tiny_manifest())
    assert bundle_digest(data) == hashlib.sha256(data).hexdigest()


def test_the_tiny_manifest_holds_with_any_key_order() -> None:
    assert decode_manifest(changed(lambda m: m.update(reversed(list(m.items()))))) == tiny_manifest()


@pytest.mark.parametrize(
    ("version", "shown"),
    [(2, "format 2"), (4, "format 4"), ("3", 'format "3"'), (None, "format null"), ([], r"format []")],
)
def test_another_format_is_refused_with_both_versions_and_what_to_do(version: Any, shown: str) -> None:
    complaint = refusal(changed(lambda m: m.update(format=version, invented_later=True)))
    assert f"has {shown}, this program reads format 3: export or download it again" in complaint


def test_a_manifest_without_a_format_says_so() -> None:
    assert "has format none" in refusal(changed(lambda m: m.pop("format")))


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        ".hidden",
        "",
        "..",
        "a\0b",
        "a\nb",
        "x" * 101,
        "ü.bin",
        MANIFEST,
        "a b",
    ],
)
def test_a_file_name_that_could_leave_the_directory_or_hide_is_refused(name: str) -> None:
    entry = {"sha256": "0" * 64, "bytes": 1}
    assert "names are plain, without directories" in refusal(
        changed(lambda m: m["files"].update({name: entry}))
    )


@pytest.mark.parametrize(
    "name", ["step.onnx", "eval.onnx", "base.bin", "tokenizer.json", "factors.safetensors"]
)
def test_a_file_that_is_used_but_not_listed_is_refused_by_name(name: str) -> None:
    assert f"does not list {name!r} among its files" in refusal(changed(lambda m: m["files"].pop(name)))


def cut(depth: int) -> Tree:
    return {"depth": depth, "prefix": f"prefix-{depth}.onnx", "step": f"step-{depth}.onnx"}


def deep(adapted: int, *depths: int) -> Callable[[Tree], object]:
    """The tiny adapter as that of a model of 3 blocks, and graphs of these depths."""

    def change(manifest: Tree) -> None:
        adapter = replace(tiny_spec(), layers=3, depth=adapted)
        manifest.update(adapter=msgspec.to_builtins(adapter), layout_sha256=adapter.layout.digest)
        manifest["graphs"]["onnxruntime"]["depths"] = [cut(depth) for depth in depths]
        entry = {"sha256": "0" * 64, "bytes": 1}
        manifest["files"].update({cut(d)[k]: entry for d in depths for k in ("prefix", "step")})

    return change


def test_graphs_of_smaller_depths_belong_to_the_files_of_their_runtime() -> None:
    manifest = decode_manifest(changed(deep(3, 1, 2)))
    files = ("step.onnx", "eval.onnx", "prefix-1.onnx", "step-1.onnx", "prefix-2.onnx", "step-2.onnx")
    assert manifest.graphs["onnxruntime"].files == (*files, "base.bin")


@pytest.mark.parametrize(("adapted", "depths"), [(3, (0, 1)), (3, (2, 1)), (3, (1, 1)), (3, (3,)), (2, (3,))])
def test_depths_that_are_unordered_or_that_the_adapter_lacks_are_refused(
    adapted: int, depths: tuple[int, ...]
) -> None:
    assert f"graphs of the depths {list(depths)}" in refusal(changed(deep(adapted, *depths)))


def test_a_graph_of_a_depth_that_is_not_listed_is_refused_by_name() -> None:
    def change(manifest: Tree) -> None:
        deep(2, 1, 2)(manifest)
        del manifest["files"]["prefix-2.onnx"]

    assert "does not list 'prefix-2.onnx'" in refusal(changed(change))


def test_labels_that_do_not_match_the_head_are_refused_with_both_counts() -> None:
    complaint = refusal(changed(lambda m: m.update(labels=["no", "yes", "maybe"])))
    assert "names 3 labels, its head has 2" in complaint


def test_a_layout_that_its_adapter_does_not_have_is_refused() -> None:
    assert "another factor layout" in refusal(changed(lambda m: m.update(layout_sha256="0" * 64)))
    assert "another factor layout" in refusal(
        changed(lambda m: m["adapter"]["inserted"]["down"].update(rank=1))
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.update(extra=1), "unknown field `extra`"),
        (lambda m: m.pop("opset"), "missing required field `opset`"),
        (lambda m: m.update(task="translation"), "`$.task`"),
        (lambda m: m["files"]["base.bin"].update(sha256="F" * 64), "`$.files[...].sha256`"),
        (lambda m: m["files"]["base.bin"].update(bytes=-1), "`$.files[...].bytes`"),
        (lambda m: m["graphs"].update(tensorrt=m["graphs"]["onnxruntime"]), "'tensorrt'"),
        (lambda m: m["adapter"]["inserted"].update(kind="prefix"), "`$.adapter.inserted.kind`"),
        (lambda m: m["adapter"]["inserted"].update(kind="lora"), "unknown field `sites`"),
        (lambda m: m["adapter"]["inserted"].update(sites=["ffn"]), "`$.adapter.inserted.sites[0]`"),
        (lambda m: m["adapter"]["inserted"].update(sites=["mlp", "mlp"]), "several different names"),
        (lambda m: m["model"].update(precision="int4"), "`$.model.precision`"),
        (lambda m: m["tokenization"].update(max_tokens=-1), "`$.tokenization.max_tokens`"),
        (lambda m: m["tokenization"].update(max_tokens=2**64), "`$.tokenization.max_tokens`"),
        (lambda m: m["tokenization"].update(min_tokens=10**15), "`$.tokenization.min_tokens`"),
        (lambda m: m["tokenization"].update(pad_id=2**63), "`$.tokenization.pad_id`"),
        (lambda m: m["requires"].update(onnxruntime="9" * 5000), "`$.requires[...]`"),
        (lambda m: m["graphs"]["onnxruntime"].pop("weights"), "missing required field `weights`"),
        (lambda m: m["adapter"].update(hidden=16), "the width of its matrices"),
        (lambda m: m["adapter"].update(depth=2), "from 1 to 1"),
        (lambda m: m["adapter"].update(depth=0, inserted={"kind": "none"}, head=None), "only with a head"),
    ],
)
def test_what_is_not_a_manifests_is_refused_with_its_place(
    change: Callable[[Tree], object], complaint: str
) -> None:
    assert complaint in refusal(changed(change))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: a.update(depth=10**12), "`$.adapter.depth`"),
        (lambda a: a.update(layers=10**12), "`$.adapter.layers`"),
        (lambda a: a.update(hidden=10**12), "`$.adapter.hidden`"),
        (lambda a: a["inserted"]["down"].update(rank=10**9), "`$.adapter.inserted.down.rank`"),
        (lambda a: a["inserted"]["down"].update(rank=0), "`$.adapter.inserted.down.rank`"),
        (lambda a: a["inserted"]["up"].update(in_modes=[10**9]), "`$.adapter.inserted.up.in_modes[0]`"),
        (lambda a: a["inserted"]["up"].update(in_modes=[0]), "`$.adapter.inserted.up.in_modes[0]`"),
        (lambda a: a["inserted"]["up"].update(in_modes=[1] * 100_000), "`$.adapter.inserted.up.in_modes`"),
        (lambda a: a["inserted"]["up"].update(out_modes=[]), "`$.adapter.inserted.up.out_modes`"),
        (lambda a: a["head"].update(labels=10**18), "`$.adapter.head.labels`"),
    ],
)
def test_a_hostile_adapter_is_refused_before_its_layout_is_counted(
    change: Callable[[Tree], object], complaint: str
) -> None:
    assert complaint in refusal(changed(lambda m: change(m["adapter"])))


WIDEST = 2**20
_wide, _huge = [2**16, 2**4], [2**16] * 16  # modes of the widest model, and of the widest bottleneck
_target = {"d_in": WIDEST, "d_out": WIDEST}


@pytest.mark.parametrize(
    "inserted",
    [
        {
            "kind": "tt",
            "sites": ["attention", "mlp"],
            "down": {"in_modes": _wide, "out_modes": _huge, "rank": 2**12},
            "up": {"in_modes": _huge, "out_modes": _wide, "rank": 2**12},
        },
        {"kind": "dense", "sites": ["attention", "mlp"], "hidden": WIDEST, "bottleneck": WIDEST},
        {
            "kind": "lora",
            "rank": 2**12,
            "alpha": 2**20,
            "targets": [{"name": name, **_target} for name in ("query", "key", "value", "output")],
        },
    ],
)
def test_an_adapter_that_no_device_could_hold_is_refused_before_its_layout_is_made(inserted: Tree) -> None:
    def grow(manifest: Tree) -> None:
        manifest["adapter"].update(layers=2**10, depth=2**10, hidden=WIDEST, inserted=inserted)
        manifest["adapter"]["head"].update(labels=2**20)

    assert "at most 134217728 numbers in 8192 factors" in refusal(changed(grow))  # 2**27, 2**13


def test_an_adapter_of_too_many_factors_is_refused_before_its_layout_is_made() -> None:
    down, up = ({"in_modes": [8], "out_modes": [1] * 16}, {"in_modes": [1] * 16, "out_modes": [8]})

    def grow(manifest: Tree) -> None:
        manifest["adapter"].update(layers=2**10, depth=2**10)
        manifest["adapter"]["inserted"].update(down=down | {"rank": 1}, up=up | {"rank": 1})

    # 1024 blocks x 2 sites x 2 matrices x 17 cores, and weight and bias of the head
    assert "in 69634 factors' is not allowed" in refusal(changed(grow))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rank": 2**13}, "`$.adapter.inserted.rank`"),
        ({"rank": 5}, "from 1 to 4"),
        ({"alpha": 0}, "`$.adapter.inserted.alpha`"),
        ({"targets": []}, "several different names"),
        ({"targets": [{"name": "query", "d_in": 8, "d_out": 2**21}]}, "targets[0].d_out"),
        ({"targets": [{"name": "gate", "d_in": 8, "d_out": 8}]}, "targets[0].name"),
        ({"targets": [{"name": "query", "d_in": 8, "d_out": 8}] * 2}, "several different names"),
    ],
)
def test_a_hostile_lora_adapter_is_refused(change: Tree, complaint: str) -> None:
    lora = {"kind": "lora", "rank": 2, "alpha": 2.0, "targets": [{"name": "query", "d_in": 8, "d_out": 4}]}
    inserted = lora | change
    assert complaint in refusal(changed(lambda m: m["adapter"].update(inserted=inserted)))


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[]", b'"\xff"', b"\xff\xfe", b"{" * 10_000, b'{"format":2,"x":' + b"[" * 900_000],
)
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    assert "is not a bundle manifest" in refusal(data)


def test_a_manifest_over_the_limit_is_refused_before_it_is_read() -> None:
    padding = b" " * (MANIFEST_LIMIT_BYTES + 1)
    assert "has 1048577 bytes, at most 1048576 are read" in refusal(padding)  # 2**20 + 1
