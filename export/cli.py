"""`fedtt export` and `fedtt verify`."""

from __future__ import annotations

import contextlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedtt.cli import add_command, add_group, print_json
from fedtt.errors import ConfigError

if TYPE_CHECKING:
    from fedtt.cli import Commands

__all__ = ["register"]


def register(commands: Commands) -> None:
    """Add the commands; torch is imported only when `export` or `verify` runs."""
    parser = add_command(
        commands,
        "export",
        about="compile the training step of a model with adapters into a bundle",
        examples="""
        fedtt export sentence-transformers/all-MiniLM-L6-v2 --labels labels.json --out bundle
        fedtt export ./llama --task causal-lm --depth 4 --rank 8 --out bundle
        fedtt export ./my-encoder --labels labels.json --adapter lora --targets query,value --out bundle
        """,
        run=_export,
    )
    parser.add_argument("model", metavar="MODEL", help="a model directory or Hugging Face hub id")
    parser.add_argument("--out", metavar="BUNDLE", type=Path, required=True, help="directory to write")
    parser.add_argument("--force", action="store_true", help="replace the bundle that --out holds")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="release key to sign the bundle with")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the graphs with torch")
    _add_task(parser)
    _add_adapter(parser)
    parser = add_command(
        commands,
        "verify",
        about="compare a bundle's graphs with torch at random factors, over several shapes",
        examples="fedtt verify bundle --model sentence-transformers/all-MiniLM-L6-v2",
        run=_verify,
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a bundle directory")
    parser.add_argument("--model", required=True, help="the directory or hub id it was exported from")
    _add_keys(commands)


def _add_keys(commands: Commands) -> None:
    keys = add_group(
        commands,
        "key",
        about="make release keys, and keys of servers that they vouch for",
        examples="fedtt key create --out release.key",
    )
    create = add_command(
        keys,
        "create",
        about="make a release key; prints the public half, which devices are given",
        examples="fedtt key create --out release.key",
        run=_create_key,
    )
    create.add_argument("--out", type=Path, required=True, help="file to write; keep it away from servers")
    delegate = add_command(
        keys,
        "delegate",
        about="make a key with which a server speaks for a release key",
        examples="fedtt key delegate --key release.key --days 365 --out server.key",
        run=_delegate,
    )
    delegate.add_argument("--key", type=Path, required=True, help="the release key")
    delegate.add_argument("--days", type=int, default=365, help="for which it is good (%(default)s)")
    delegate.add_argument("--out", type=Path, required=True, help="file to write: `fedtt serve --server-key`")
    bundles = add_group(
        commands, "bundle", about="sign bundles", examples="fedtt bundle sign bundle --key release.key"
    )
    sign = add_command(
        bundles,
        "sign",
        about="sign a bundle, in place, for devices that trust the release key",
        examples="fedtt bundle sign bundle --key release.key",
        run=_sign,
    )
    sign.add_argument("bundle", metavar="BUNDLE", type=Path, help="a bundle directory")
    sign.add_argument("--key", type=Path, required=True, help="the release key")


def _create_key(args: Namespace) -> None:
    from .signing import create_key

    public = create_key(args.out)
    print_json({"release_key": public, "path": str(args.out)}) if args.json else print(public)


def _delegate(args: Namespace) -> None:
    from .signing import delegate, read_key

    found = delegate(read_key(args.key), args.out, args.days)
    public = found.release_key.hex()
    if args.json:
        print_json({"release_key": public, "expires": found.expires, "path": str(args.out)})
    else:
        print(f"{args.out} speaks for release key {public} for {args.days} days")


def _sign(args: Namespace) -> None:
    from .signing import read_key, sign_bundle

    digest = sign_bundle(args.bundle, read_key(args.key))
    print_json({"bundle": digest}) if args.json else print(f"signed; the bundle is now {digest}")


def _add_task(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("task")
    group.add_argument(
        "--task", default="sequence-classification", help="sequence-classification (default) or causal-lm"
    )
    group.add_argument("--labels", type=Path, help='JSON: ["no", "yes"] or {"labels": ["no", "yes"]}')
    group.add_argument("--head", help="label-names (default), tt or dense")
    group.add_argument("--head-rank", type=int, help="of a label-names or tt head (10)")
    group.add_argument(
        "--runtime", dest="runtimes", type=_names, default=("onnxruntime",), metavar="NAMES",
        help="onnxruntime (always), and executorch beside it: onnxruntime,executorch",
    )  # fmt: skip
    group.add_argument(
        "--dp", dest="private", action="store_true",
        help="compile a step, too, that clips each example's gradient: for tasks with [privacy]",
    )  # fmt: skip
    group.add_argument("--base", default="fp32", help="store the base as fp32 (default), fp16 or int8")
    group.add_argument(
        "--products", default="fp32",
        help="multiply with the base in fp32 (default) or, with --base int8, in int8: faster, less exact",
    )  # fmt: skip
    group.add_argument("--max-tokens", type=int, default=128, help="longer texts are cut (%(default)s)")


def _add_adapter(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("adapter")
    group.add_argument(
        "--adapter", default="tt", help="tt (default), dense, lora, lora-sb, or none: head alone"
    )
    group.add_argument("--depth", type=_depth, help="adapt only the last blocks, or 'all' (default)")
    group.add_argument(
        "--depths",
        type=_numbers,
        help="also compile the step of only so many last blocks, as 1,2,3 (default)",
    )
    group.add_argument("--rank", type=int, help="of tt (5), lora (8) or lora-sb (32)")
    group.add_argument("--bottleneck", type=int, help="inner width of tt and dense (64, or the model's)")
    group.add_argument("--sites", type=_names, help="of tt and dense: attention,mlp (default)")
    group.add_argument("--targets", type=_names, help="of lora, lora-sb: query,value (default), key, output")
    group.add_argument(
        "--alpha", type=float, help="of lora, lora-sb, which count alpha / rank times (the rank)"
    )
    group.add_argument("--hidden-modes", type=_numbers, help="of TT matrices, as 8,8,6; planned if not given")
    group.add_argument("--bottleneck-modes", type=_numbers, help="of tt, as 8,8; planned if not given")
    group.add_argument("--seed", type=int, default=0, help="of the factors' first values (%(default)s)")


def _depth(text: str) -> int | None:
    return None if text == "all" else int(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    """No text means none of them."""
    return tuple(int(number) for number in text.split(",") if number)


_REQUEST = (
    "model", "task", "head", "head_rank", "max_tokens", "adapter", "depth", "depths", "rank", "bottleneck",
    "sites", "targets", "alpha", "hidden_modes", "bottleneck_modes", "seed", "runtimes", "base",
    "products", "private",
)  # fmt: skip


def _export(args: Namespace) -> None:
    from .labels import read_labels
    from .request import ExportRequest

    if args.task == "sequence-classification" and args.labels is None:
        raise ConfigError("labels", None, "a JSON file with the names of the classes: --labels labels.json")
    labels = read_labels(args.labels) if args.labels else ()
    key = None
    if args.sign:
        from .signing import read_key, sign_bundle

        key = read_key(args.sign)  # refuse nonsense before minutes of work
    request = ExportRequest(labels=labels, **{name: getattr(args, name) for name in _REQUEST})
    with _progress() as report:
        from .compile import export_bundle

        summary = export_bundle(request, args.out, force=args.force, verify=not args.no_verify, report=report)
    if key is not None:
        sign_bundle(args.out, key)
    if args.json:
        print_json(summary)
    else:
        from .summary import render

        print(render(summary))


def _verify(args: Namespace) -> None:
    with _progress() as report:
        report("loading torch")
        from .verify import verify_bundle

        report(f"comparing {args.bundle} with {args.model}")
        differences = verify_bundle(args.bundle, args.model)
    for difference in differences:
        if args.json:
            print_json(difference)
        else:
            print(difference.line())
    if not args.json:
        allowed = differences[0].allowed
        print(f"largest difference {max(d.largest for d in differences):.1e}, allowed {allowed:.0e}")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr with what is being done, where someone is watching."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("loading torch") as status:
        yield lambda stage: status.update(stage)
