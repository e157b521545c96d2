#!/bin/sh
# From raw text to a small assistant, with the time of each stage. assistant.sh PYTHON
# A stage that was finished is not repeated; one that was stopped goes on.
set -eu
nemotron="$1 -m nemotron"
recipes=recipes/tiny/assistant
chats=runs/assistant-chats.jsonl
results=runs/assistant-results

timed() {  # timed NAME COMMAND...
    name=$1; shift; begin=$(date +%s)
    "$@"
    printf '%-10s %5d s\n' "$name" $(($(date +%s) - begin)) >> "$times"
}

mkdir -p $results
times=$results/times.txt
: > "$times"
[ -e $chats ] || timed chats $nemotron rl chats arith_chain mcqa --count 3000 --out $chats
for stage in pretrain sft rl heal; do
    timed $stage $nemotron train $recipes/$stage.yaml --resume
done

echo; echo "Held-out tasks, likeliest answers"
for model in assistant-base assistant-sft assistant-rl assistant; do
    echo "$model:"
    timed evaluate $nemotron rl evaluate $recipes/rl.yaml --model runs/$model \
        --out $results/$model.json
done
echo; echo "The assistant, by budget of reasoning in tokens"
plot=
if "$1" -c 'import matplotlib' 2> /dev/null; then plot="--plot $results/budgets.svg"; fi
timed budgets $nemotron rl evaluate $recipes/rl.yaml --model runs/assistant \
    --budget 0 --budget 2 --budget 4 --budget 8 --budget 16 --out $results/budgets.json $plot

echo; echo "A turn of conversation: 7+5="
echo "7+5=" | $nemotron chat runs/assistant --temperature 0 --max-new-tokens 32
timed export $nemotron export runs/assistant --out runs/assistant/export --overwrite

echo; echo "Time of each stage"; cat "$times"
cat <<END

runs/assistant-*/metrics.jsonl   every number of each stage     $results   rewards as JSON
runs/assistant/export            the model for transformers, with its chat template
next:
  $nemotron chat runs/assistant
  $nemotron rl reverify runs/assistant-rl
END
