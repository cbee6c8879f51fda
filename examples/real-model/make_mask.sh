#!/bin/sh
# From a chat model and three files of prompts to a mask whose levels were chosen by measurement, and its report.
# Knows the order of the steps and the files between them. Knows nothing of what a step does.
#
#   MODEL=path/to/model HARMFUL=advbench.csv BENIGN=benign.jsonl BORDERLINE=or-bench.csv make_mask.sh
#
# Every setting is an environment variable; README.md beside this file explains them. Run again after an
# interruption, it goes on where it was.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

MODEL=${MODEL:-}
HARMFUL=${HARMFUL:-$here/data/harmful.csv}
BENIGN=${BENIGN:-$here/data/benign.jsonl}
BORDERLINE=${BORDERLINE:-$here/data/borderline.jsonl}
HARMFUL_KIND=${HARMFUL_KIND:-}
BENIGN_KIND=${BENIGN_KIND:-}
BORDERLINE_KIND=${BORDERLINE_KIND:-}
OUT=${OUT:-build/real-model}
REFUSAL=${REFUSAL:-}

TUNING_ATTACKS=${TUNING_ATTACKS:-override,persona,hypothetical,format_request,opener,grandmother,classroom,code_comment,emotion,query,shell,mail,threat,urgency,crowd,verse,distraction,survey,obedience,notebook,blanks,spreadsheet,patch,typesetting}
VALIDATION_ATTACKS=${VALIDATION_ATTACKS:-authority,puzzle,few_shot,warning_label,markup,translation,flattery}
TEST_ATTACKS=${TEST_ATTACKS:-fiction,foreign,no_apology,json,debate,reward,noise_suffix}
VALIDATION_SHARE=${VALIDATION_SHARE:-0.33}
TEST_SHARE=${TEST_SHARE:-0.25}
LIMIT=${LIMIT:-200}
SEED=${SEED:-0}

METHOD=${METHOD:-attack_aware}
ATTRIBUTE_OPTIONS=${ATTRIBUTE_OPTIONS:-}
NEURON_SHARE=${NEURON_SHARE:-0.0198}
TUNE_OPTIONS=${TUNE_OPTIONS:-}
ALLOW_LESS_SAFE=${ALLOW_LESS_SAFE:-no}
DEVICE=${DEVICE:-auto}
DTYPE=${DTYPE:-auto}
BATCH_SIZE=${BATCH_SIZE:-16}

LEVELS=${LEVELS:-}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-64}
JUDGE_URL=${JUDGE_URL:-}
JUDGE_MODEL=${JUDGE_MODEL:-}

fail() {
    printf 'make_mask.sh: %s\n' "$1" >&2
    exit 1
}

step() {
    printf '\n== %s\n' "$1"
}

# The words of a command, and the sums of the files among them but for the one that it makes.
words_and_sums() {
    made=$1
    shift
    for word; do
        if [ -f "$word" ] && [ "$word" != "$made" ]; then
            printf '%s %s\n' "$word" "$(cksum <"$word")"
        else
            printf '%s\n' "$word"
        fi
    done
}

# once FILE COMMAND...: run the command that makes FILE, unless it did already, with the same words and files.
once() {
    file=$1
    shift
    if [ ! -e "$file" ] || [ ! -e "$file.made" ]; then
        "$@"
        words_and_sums "$file" "$@" >"$file.made"
    elif words_and_sums "$file" "$@" | diff "$file.made" - >&2; then
        printf '%s is there already.\n' "$file"
    else
        fail "$file was made with other settings (< then, > now). Name another folder in OUT, or remove that file."
    fi
}

command -v neurontune >/dev/null || fail "neurontune is not on PATH; after make install: PATH=.venv/bin:\$PATH"
[ -n "$MODEL" ] || fail "MODEL is missing: name a folder that holds a chat model, or demo to try the steps."
for file in "$HARMFUL" "$BENIGN" "$BORDERLINE"; do
    [ -r "$file" ] || fail "$file cannot be read: HARMFUL, BENIGN and BORDERLINE name files of prompts."
done
case $ALLOW_LESS_SAFE in
yes | no) ;;
*) fail "ALLOW_LESS_SAFE=$ALLOW_LESS_SAFE is neither yes nor no." ;;
esac
families=$TUNING_ATTACKS,$VALIDATION_ATTACKS,$TEST_ATTACKS
repeated=$(printf '%s\n' "$families" | tr ',' '\n' | sort | uniq -d | tr '\n' ' ')
[ -z "$repeated" ] || fail "Attack families ${repeated}are named twice. Give each to one of TUNING_ATTACKS, \
VALIDATION_ATTACKS and TEST_ATTACKS, or figures on the later ones say nothing about new attacks."
case ",$families," in
*,all,*) fail "Attack families 'all' leaves none for another purpose: name families (docs/evaluation.md lists them)." ;;
esac

mkdir -p "$OUT"

step "Prompts: to learn from, to choose by, and to measure with; no prompt and no attack family in two of them"
neurontune prompts "$HARMFUL" ${HARMFUL_KIND:+--kind "$HARMFUL_KIND"} --prefix harmful- --out "$OUT/harmful.jsonl"
neurontune prompts "$BENIGN" ${BENIGN_KIND:+--kind "$BENIGN_KIND"} --prefix benign- --out "$OUT/benign.jsonl"
neurontune prompts "$BORDERLINE" ${BORDERLINE_KIND:+--kind "$BORDERLINE_KIND"} --prefix borderline- \
    --out "$OUT/borderline.jsonl"
neurontune prompts "$OUT/harmful.jsonl" "$OUT/benign.jsonl" "$OUT/borderline.jsonl" --limit "$LIMIT" --seed "$SEED" \
    --out "$OUT/seen.jsonl" --rest "$OUT/test.jsonl" --rest-share "$TEST_SHARE" --rest-attacks "$TEST_ATTACKS"
neurontune prompts "$OUT/seen.jsonl" --attacks "$TUNING_ATTACKS" --seed "$SEED" --out "$OUT/tuning.jsonl" \
    --rest "$OUT/validation.jsonl" --rest-share "$VALIDATION_SHARE" --rest-attacks "$VALIDATION_ATTACKS"

step "Attribution: which neurons carry refusal, which help"
set --
for option in $ATTRIBUTE_OPTIONS; do
    set -- "$@" --option "$option"
done
once "$OUT/scores.safetensors" \
    neurontune attribute --model "$MODEL" --data "$OUT/tuning.jsonl" --method "$METHOD" --seed "$SEED" \
    --batch-size "$BATCH_SIZE" --device "$DEVICE" --dtype "$DTYPE" ${REFUSAL:+--refusal "$REFUSAL"} "$@" \
    --out "$OUT/scores.safetensors"

step "Tuning: how much to amplify or suppress each"
set --
for option in $TUNE_OPTIONS; do
    set -- "$@" --option "$option"
done
once "$OUT/tuned.safetensors" \
    neurontune tune --model "$MODEL" --data "$OUT/tuning.jsonl" --validation "$OUT/validation.jsonl" \
    --scores "$OUT/scores.safetensors" --share "$NEURON_SHARE" --seed "$SEED" --device "$DEVICE" --dtype "$DTYPE" \
    ${REFUSAL:+--refusal "$REFUSAL"} "$@" --out "$OUT/tuned.safetensors"

step "Levels: how many neurons each level touches, chosen on a measured curve"
set --
[ "$ALLOW_LESS_SAFE" = no ] || set -- --allow-less-safe
once "$OUT/mask.safetensors" \
    neurontune levels --model "$MODEL" --mask "$OUT/tuned.safetensors" --data "$OUT/validation.jsonl" \
    --device "$DEVICE" --dtype "$DTYPE" "$@" --out "$OUT/mask.safetensors"

step "Evaluation: prompts and attacks that nothing above has seen"
neurontune evaluate --model "$MODEL" --mask "$OUT/mask.safetensors" --data "$OUT/test.jsonl" \
    ${LEVELS:+--levels "$LEVELS"} --max-new-tokens "$MAX_NEW_TOKENS" --batch-size "$BATCH_SIZE" --device "$DEVICE" \
    --dtype "$DTYPE" ${JUDGE_URL:+--judge-url "$JUDGE_URL"} ${JUDGE_MODEL:+--judge-model "$JUDGE_MODEL"} \
    --answers-out "$OUT/answers.jsonl" --json "$OUT/report.json" --html "$OUT/report.html"

step "Serve it"
printf 'neurontune serve --model "%s" --mask "%s"\n' "$MODEL" "$OUT/mask.safetensors"
