"""Cut a wheel down to some of its files, keeping its metadata: vLLM's is 300 MB, its copy of DeepGEMM 11 MB.

Usage: python tools/part_of_wheel.py vllm-0.33.0-*.whl 'vllm/third_party/deep_gemm/*' --into FOLDER
"""

from __future__ import annotations

import argparse
import fnmatch
import zipfile
from pathlib import Path


def cut(wheel: Path, patterns: list[str], target: Path) -> None:
    """Write ``target``: what matches one of ``patterns``, the metadata, and a RECORD of just that."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as part:
        kept = set()
        (record,) = (name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        for item in source.infolist():
            wanted = any(fnmatch.fnmatchcase(item.filename, p) for p in (*patterns, record.replace("RECORD", "*")))
            if wanted and item.filename != record:
                part.writestr(item, source.read(item), zipfile.ZIP_DEFLATED, 9)
                kept.add(item.filename)
        lines = source.read(record).decode().splitlines()
        kept.add(record)
        part.writestr(record, "".join(f"{line}\n" for line in lines if line.rsplit(",", 2)[0].strip('"') in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pattern", nargs="+")
    parser.add_argument("--into", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    cut(arguments.wheel, arguments.pattern, arguments.into / arguments.wheel.name)


if __name__ == "__main__":
    main()
