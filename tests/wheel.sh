#!/usr/bin/env bash
# tests/wheel.sh PYTHON: build the wheel, install it in a fresh environment, use it in an empty folder.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$1" -m venv "$folder/venv"
bin=$folder/venv/bin
quietly=(--quiet --disable-pip-version-check)
mkdir "$folder/source"
tar -C "$checkout" -c torchrl_marl recipes setup.py pyproject.toml MANIFEST.in README.md LICENSE constraints.txt \
    CHANGELOG.md CITATION.cff | tar -x -C "$folder/source"
"$bin/python" -m pip wheel "${quietly[@]}" --no-deps --wheel-dir "$folder" "$folder/source"
wheel=$(echo "$folder"/torchrl_marl-*.whl)
"$bin/python" -m pip install "${quietly[@]}" --constraint "$checkout/constraints.txt" "${wheel}[vmas,export]"
rm -r "$folder/source"
mkdir "$folder/work" && cd "$folder/work"
short=(env.num_envs=6 total_frames=1200 frames_per_batch=600 minibatch_size=600 evaluation.interval=1200 evaluation.episodes=2 evaluation.video=false)
"$bin/torchrl-marl" --version
"$bin/torchrl-marl" ls | grep mars_vmas
"$bin/torchrl-marl" train "${short[@]}"
"$bin/torchrl-marl" cp marpo_vmas mine
sed -i.before 's/^gamma: .*/gamma: 0.9/' mine/config/loop.yaml
"$bin/python" mine/marpo_vmas.py "${short[@]}"
grep -q "gamma: 0.9$" runs/marpo_vmas/*/*/*/config.yaml
"$bin/torchrl-marl" export runs/mars_vmas/*/*/* --output policy.onnx
"$bin/torchrl-marl" evaluate runs/mars_vmas/*/*/* --episodes 2
"$bin/torchrl-marl" evaluate zoo:navigation/mars --episodes 2
test -s policy.onnx
