#!/usr/bin/env bash
# Get the vocabulary of the released CPM-Bee models (86,583 tokens) as src/ckpts/vocab.txt.
# It is part of the Python wheel `viscpm`; only that file is used, and nothing is installed.
#   bash scripts/fetch_vocab.sh [TARGET]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv
target="${1:-$project/src/ckpts/vocab.txt}"
member="VisCPM/cpm_tokenizers/vocabs/bee.txt"
expected="e733a3080e0a2b176e994bc04f53f98390d6146fc2b828464edb0243aeb536ff"

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps -d "$folder" viscpm==0.0.1.dev0
python3 - "$folder" "$member" "$expected" "$target" <<'PY'
import contextlib, hashlib, os, pathlib, sys, zipfile

folder, member, expected, target = sys.argv[1:]
(wheel,) = pathlib.Path(folder).glob("*.whl")
data = zipfile.ZipFile(wheel).read(member)
found = hashlib.sha256(data).hexdigest()
if found != expected:
    sys.exit(f"error: {member} has sha256 {found}, expected {expected}; nothing was written")
path = pathlib.Path(target)
partial = path.with_name(f".{path.name}.partial")
try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(data)
    os.replace(partial, path)
except OSError as error:
    with contextlib.suppress(OSError):
        partial.unlink()
    sys.exit(f"error: {path}: cannot be written: {error.strerror}")
print(f"{path}: {len(data.decode().split(chr(10))):,} tokens")
PY
