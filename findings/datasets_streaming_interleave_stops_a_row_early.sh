#!/usr/bin/env bash
# interleave_datasets(stopping_strategy="all_exhausted") gives streams fewer rows than the same data in memory.
#
# Packages: datasets==5.2.0 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: interleaving map-style datasets and interleaving their .to_iterable_dataset() streams give the same
# rows in the same order, as the documentation describes one rule for both.
#
# Really: with "first_exhausted", "all_exhausted_without_replacement", or any probabilities they do. With
# "all_exhausted" and no probabilities the map-style call fills up the last round for all datasets, and the stream
# stops in the middle of it, at the last row of the longest: with k datasets up to k - 1 rows fewer, always of the
# datasets that stand after it. Put the longest first and the others lose a row; put it last and both agree.
#
# Why it matters: the same recipe has another number of steps per epoch and other task weights once it is switched to
# streaming, and a schedule or a resume that counted rows of one is off in the other.
#
# Output seen:
#   first_exhausted, probabilities None: 6 rows in memory, 6 streamed
#   first_exhausted, probabilities [0.6, 0.2, 0.2]: 6 rows in memory, 6 streamed
#   all_exhausted_without_replacement, probabilities None: 12 rows in memory, 12 streamed
#   all_exhausted_without_replacement, probabilities [0.6, 0.2, 0.2]: 12 rows in memory, 12 streamed
#   all_exhausted, probabilities None: 21 rows in memory, 19 streamed
#     in memory: l0 m0 s0 l1 m1 s1 l2 m2 s0 l3 m0 s1 l4 m1 s0 l5 m2 s1 l6 m0 s0
#     streamed:  l0 m0 s0 l1 m1 s1 l2 m2 s0 l3 m0 s1 l4 m1 s0 l5 m2 s1 l6
#   all_exhausted, probabilities [0.6, 0.2, 0.2]: 16 rows in memory, 16 streamed
#   longest last: 21 rows in memory, 21 streamed
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check datasets==5.2.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import datasets

datasets.disable_progress_bars()
sizes = {"long": 7, "mid": 3, "short": 2}
data = {
    name: datasets.Dataset.from_dict({"row": [f"{name[0]}{number}" for number in range(size)]})
    for name, size in sizes.items()
}


def both(order, **settings):
    mapped = datasets.interleave_datasets([data[name] for name in order], seed=0, **settings)["row"]
    stream = datasets.interleave_datasets([data[name].to_iterable_dataset() for name in order], seed=0, **settings)
    return list(mapped), [row["row"] for row in stream]


for strategy in ("first_exhausted", "all_exhausted_without_replacement", "all_exhausted"):
    for probabilities in (None, [0.6, 0.2, 0.2]):
        mapped, stream = both(("long", "mid", "short"), stopping_strategy=strategy, probabilities=probabilities)
        print(f"{strategy}, probabilities {probabilities}: {len(mapped)} rows in memory, {len(stream)} streamed")
        if strategy == "all_exhausted" and probabilities is None:
            print("  in memory:", *mapped)
            print("  streamed: ", *stream)
            assert len(mapped) == 21 and len(stream) == 19 and mapped[:19] == stream
        else:
            assert mapped == stream
mapped, stream = both(("short", "mid", "long"), stopping_strategy="all_exhausted")
print(f"longest last: {len(mapped)} rows in memory, {len(stream)} streamed")
assert mapped == stream and len(mapped) == 21
EOF
