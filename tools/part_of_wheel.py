"""Cut a wheel down to some of its folders, keeping its metadata: vLLM's is 300 MB, its copy of DeepGEMM 11 MB.

Usage: python tools/part_of_wheel.py vllm-0.33.0-*.whl vllm/third_party/deep_gemm/ --into FOLDER
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path


def cut(wheel: Path, prefixes: tuple[str, ...], target: Path) -> None:
    """Write ``target``: what begins with one of ``prefixes``, the metadata, and a RECORD of just that."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as part:
        kept = set()
        (record,) = (name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        for item in source.infolist():
            if item.filename.startswith((*prefixes, record.removesuffix("RECORD"))) and item.filename != record:
                part.writestr(item, source.read(item), zipfile.ZIP_DEFLATED)
                kept.add(item.filename)
        lines = source.read(record).decode().splitlines()
        kept.add(record)
        part.writestr(record, "".join(f"{line}\n" for line in lines if line.rsplit(",", 2)[0].strip('"') in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("prefix", nargs="+")
    parser.add_argument("--into", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    cut(arguments.wheel, tuple(arguments.prefix), arguments.into / arguments.wheel.name)


if __name__ == "__main__":
    main()
