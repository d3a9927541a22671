#!/usr/bin/env bash
# Finds libtorch 2.9.0 for the feature `tch`, or makes a folder with one, and prints what to export.
#
#   eval "$(scripts/libtorch.sh)"              # in target/libtorch
#   eval "$(scripts/libtorch.sh FOLDER)"
#   cargo build --release --features tch
#
# Taken first: a Python with PyTorch 2.9 (`python3`, or $PYTHON), with CUDA if it has that. Otherwise, on
# Linux on x86-64, the processor's part of PyPI's wheel: 1 GB is fetched, 490 MB are kept. What is done goes to standard
# error, the exports alone to standard output. Needs Python 3 with pip.
set -euo pipefail

VERSION=2.9.0
python=${PYTHON:-python3}
folder=${1:-$(dirname "$0")/../target/libtorch}

say() { echo "libtorch.sh: $*" >&2; }
fail() {
    say "$*"
    exit 1
}

work=
finish() { # whatever went wrong: `false` is what eval then gives
    local status=$?
    [[ -z $work ]] || rm -rf "$work"
    [[ $status == 0 ]] || echo false
}
trap finish EXIT

command -v "$python" >/dev/null || fail "expected Python 3, found no '$python'; install it, or set PYTHON"

exports() { # LIBRARIES: what the linker and the programs need
    echo "export LD_LIBRARY_PATH='$1'\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
}

installed=$("$python" - 2>/dev/null <<'PYTHON' || true
import torch
from torch.utils import cpp_extension
print(torch.__version__.split("+")[0], cpp_extension.library_paths()[0])
PYTHON
)
if [[ $installed == 2.9.* ]]; then
    say "using the PyTorch ${installed%% *} of $python"
    # The build asks `python3`, or `python` where VIRTUAL_ENV is set.
    asked=python3
    [[ -z ${VIRTUAL_ENV:-} ]] || asked=python
    if [[ $(command -v "$asked") != "$(command -v "$python")" ]]; then
        beside=$(cd "$(dirname "$(command -v "$python")")" && pwd)
        env PATH="$beside:$PATH" "$asked" -c 'import torch' 2>/dev/null || fail "$python has PyTorch, but the build" \
            "asks '$asked', and the one in $beside has none; use a virtual environment's Python"
        echo "export PATH='$beside':\$PATH"
    fi
    echo "export LIBTORCH_USE_PYTORCH=1"
    [[ ${installed%% *} == "$VERSION" ]] || echo "export LIBTORCH_BYPASS_VERSION_CHECK=1"
    exports "${installed#* }"
    exit
fi

if [[ ! -e $folder/build-version ]]; then
    [[ -z $(ls -A "$folder" 2>/dev/null) ]] ||
        fail "$folder: expected libtorch (a file build-version), an empty folder or none; choose another folder"
    [[ $(uname -sm) == "Linux x86_64" ]] || fail "expected Linux on x86-64, found $(uname -sm); install PyTorch" \
        "$VERSION (pip install torch==$VERSION) or unpack https://pytorch.org's libtorch and set LIBTORCH"
    "$python" -m pip --version >/dev/null 2>&1 || fail "expected pip, found none; install it (Debian: python3-pip)"
    mkdir -p "$(dirname "$folder")"
    work=$(mktemp -d "$(dirname "$folder")/libtorch.XXXXXX")
    say "fetching PyTorch $VERSION from PyPI, 1 GB"
    # The libraries are the same for every version of Python.
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.11 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
        --dest "$work" "torch==$VERSION" nvidia-cuda-runtime-cu12==12.8.90 nvidia-cuda-cupti-cu12==12.8.90 >&2
    say "taking the processor's part out of it"
    "$python" - "$work" <<'PYTHON'
import pathlib, sys, zipfile
work = pathlib.Path(sys.argv[1])
# libtorch_cpu.so asks for the two of CUDA even where it is never used; libtorch_cuda.so must not be there,
# for it would be linked.
libraries = {
    "torch/lib/libc10.so", "torch/lib/libtorch_cpu.so", "torch/lib/libgomp.so.1",
    "nvidia/cuda_runtime/lib/libcudart.so.12", "nvidia/cuda_cupti/lib/libcupti.so.12",
}
made = work / "made"
(made / "lib").mkdir(parents=True)
for wheel in work.glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = None
            if name in libraries:
                target = made / "lib" / pathlib.Path(name).name
            elif name.startswith("torch/include/") and not name.endswith("/"):
                target = made / name.removeprefix("torch/")
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
found = {path.name for path in (made / "lib").iterdir()}
missing = {pathlib.Path(name).name for name in libraries} - found
sys.exit(f"libtorch.sh: the wheels lack {', '.join(sorted(missing))}" if missing else 0)
PYTHON
    ln -s libtorch_cpu.so "$work/made/lib/libtorch.so"
    ln -s libgomp.so.1 "$work/made/lib/libgomp.so"
    echo "$VERSION" >"$work/made/build-version"
    [[ ! -d $folder ]] || rmdir "$folder"
    mv "$work/made" "$folder"
fi
folder=$(cd "$folder" && pwd)
[[ $(cat "$folder/build-version") == "$VERSION"* ]] ||
    fail "$folder: expected libtorch $VERSION, found $(cat "$folder/build-version"); choose another folder"
say "using $folder"
echo "export LIBTORCH='$folder'"
exports "$folder/lib"
