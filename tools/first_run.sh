#!/bin/sh
# The first run, end to end: train half, resume, sample, export. first_run.sh PYTHON
set -eu
nemotron="$1 -m nemotron"
recipe=recipes/tiny/pretrain.yaml
run=runs/tiny

if [ ! -e "$run/checkpoints/step-00000150" ] && [ ! -e "$run/checkpoints/step-00000300" ]; then
    # stopped in the middle on purpose: 75 says "stopped early, can be resumed"
    $nemotron train $recipe --resume --stop-at 150 || [ $? -eq 75 ]
fi
$nemotron train $recipe --resume
$nemotron generate $run --prompt 'def read(self, size=-1):' --max-new-tokens 64 --seed 1
$nemotron generate $run --prompt 'Return the number of' --max-new-tokens 64 --seed 1
$nemotron export $run --out $run/export --overwrite

cat <<END

$run/checkpoints  the trained model, resumable      $run/metrics.jsonl  every number of the run
$run/export       the model for transformers        $run/recipe.yaml    what was run
next:
  $nemotron generate $run --prompt "To be, or not"
  $nemotron train recipes/tiny/nano.yaml        # another model
  $nemotron recipe show recipes/super/pretrain.yaml   # the same code, with Super's numbers
END
