#!/bin/sh
# From raw text to a small assistant that reasons and calls a tool, with the time of each stage.
# assistant.sh PYTHON
# A stage that was finished is not repeated; one that was stopped goes on.
set -eu
nemotron="$1 -m nemotron"
recipes=recipes/tiny/assistant
results=runs/assistant-results
times=$results/times.txt
spent=$results/spent.txt

seconds() {  # of processors, in all commands so far
    times > "$spent"
    awk -F '[ms ]+' 'NR == 2 {print int($1 * 60 + $2 + $3 * 60 + $4)}' "$spent" > "$1"
}
timed() {  # timed NAME COMMAND...
    name=$1; shift; begin=$(date +%s); seconds "$spent.old"
    "$@"
    seconds "$spent.new"
    printf '%-10s %5d s %5d s\n' "$name" $(($(date +%s) - begin)) \
        $(($(cat "$spent.new") - $(cat "$spent.old"))) >> "$times"
}
chats() {  # chats FILE COUNT TASKS...
    out=$1; count=$2; shift 2
    [ -e "$out" ] || timed chats $nemotron rl chats "$@" --count "$count" \
        --held-out 0.2 --out "$out"
}

mkdir -p $results
: > "$times"
chats runs/assistant-sums.jsonl 5000 arith_chain@0.5
chats runs/assistant-questions.jsonl 4000 mcqa
chats runs/assistant-calls.jsonl 3000 arith_chain@1+tools
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
timed budgets $nemotron rl evaluate $recipes/rl.yaml --model runs/assistant \
    --budget 0 --budget 4 --budget 8 --budget 16 \
    --out $results/budgets.json --plot $results/budgets.svg

echo; echo "Two turns of conversation, without and with a calculator: 7+5= and 8*7-9="
echo "7+5=" | $nemotron chat runs/assistant --temperature 0 --max-new-tokens 72
echo "8*7-9=" | $nemotron chat runs/assistant --calculator --temperature 0 --max-new-tokens 72
timed export $nemotron export runs/assistant --out runs/assistant/export --overwrite

echo; echo "Time of each stage, on the clock and of processors"; cat "$times"
cat <<END

runs/assistant-*/metrics.jsonl   every number of each stage     $results   rewards as JSON
runs/assistant/export            the model for transformers, with its chat template
next:
  $nemotron chat runs/assistant --calculator
  $nemotron rl reverify runs/assistant-rl
END
