#!/usr/bin/env bash
# Figure 6: two arms without alignment, with spatial forcing and with ROCKET.
#   figure6.sh [OUT]       a mini student in a bimanual simulator, on a CPU (figure6_mini.sh)
#   figure6.sh --profile paper --vla_path PI0_FOLDER --data_root_dir datasets/robotwin [--tasks A,B] [--robotwin CHECKOUT]
#     pi0 with LoRA in RoboTwin 2.0, the release's settings: a policy a task, 100 trials, easy (demo_clean) and hard
#     (demo_randomized). The figure has five tasks; the release names one of them, the default. Name the others yourself.
#     Without --robotwin, the evaluation's commands are printed. With it, `python` must be RoboTwin's own: checkpoints are
#     served from this project's environment. What has a _result.txt there is not evaluated again.
#   More flags: --teacher_path --arms --seeds --out --unseen|--seen --dry_run.      PYTHON names this project's interpreter.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { echo "error: $1; accepted: see the head of ${BASH_SOURCE[0]}" >&2; exit 2; }
profile=mini given=()
while [ $# -gt 0 ]; do
  if [ "$1" = --profile ]; then profile=${2:-}; shift; else given+=("$1"); fi
  shift || true
done
set -- "${given[@]}"
case $profile in
  mini)
    [[ $# -le 1 && ${1:-} != -* ]] || usage "'$*' found without --profile paper"
    exec "$here/figure6_mini.sh" "$@" ;;
  paper) ;;
  *) usage "--profile: '$profile' found" ;;
esac

vla_path='' data='' teacher=facebook/VGGT-1B tasks=move_playingcard_away robotwin='' seeds=0 split=unseen run='' out=runs/reproduce/figure6
# The release trains ROCKET with 0.125 and spatial forcing with 0.5; the last two arms have the other one's weight.
arms=baseline,spatial_forcing,rocket,rocket-equal,spatial_forcing-equal
declare -A weights=([baseline]='' [spatial_forcing]=0.5 [rocket]=0.125 [rocket-equal]=0.5 [spatial_forcing-equal]=0.125)
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) run=echo ;;
    --seen | --unseen) split=${1#--} ;;
    --vla_path | --data_root_dir | --teacher_path | --tasks | --arms | --robotwin | --seeds | --out)
      [ $# -gt 1 ] || usage "$1: no value found"
      name=${1#--}; [ "$name" != data_root_dir ] || name=data; [ "$name" != teacher_path ] || name=teacher
      printf -v "$name" %s "$2"; shift ;;
    *) usage "$1 found" ;;
  esac
  shift
done
[ -n "$vla_path" ] || usage "--vla_path: not given"
[ -n "$data" ] || usage "--data_root_dir: not given"
[ -z "$robotwin" ] || [ -f "$robotwin/policy/ROCKET/eval.sh" ] || usage "--robotwin: no policy/ROCKET/eval.sh in '$robotwin' found"
for arm in ${arms//,/ }; do [ -n "${weights[$arm]+known}" ] || usage "--arms: $arm found"; done
for name in vla_path data teacher robotwin; do  # A hub's name stays as it is.
  [ ! -e "${!name}" ] || printf -v "$name" %s "$(realpath "${!name}")"
done
cd "$here/../.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=${PYTHON:-python}
server=''
trap '[ -z "$server" ] || kill "$server"' EXIT

serve() { # sets `address` to where the checkpoint's server, a process of its own, answers
  "${serving[@]}" --port 0 >"$checkpoint.log" 2>&1 &
  server=$!
  until address=$(sed -n 's/^serving .* at \(http[^ ]*\) .*/\1/p' "$checkpoint.log") && [ -n "$address" ]; do
    kill -0 $server 2>/dev/null || { server=''; echo "error: no server of $checkpoint: see $checkpoint.log" >&2; exit 1; }
    sleep 1
  done
}

evaluate() { # checkpoint, task, seed, name of its results: 100 trials from seed 100000 * (1 + seed) on, easy and hard
  local checkpoint=$1 address=http://127.0.0.1:8777 show=$run
  local serving=("$python" vla-scripts/deploy.py --pretrained_checkpoint "$checkpoint" --num_images_in_input 3)
  [ -n "$robotwin" ] || show=echo
  [ -z "$show" ] || echo "${serving[*]} --port 8777"
  for config in demo_clean demo_randomized; do
    results=("$robotwin/eval_result/$2/ROCKET/$config/$4"/*/_result.txt)
    [ ! -f "${results[0]}" ] || continue
    [ -n "$show$server" ] || serve
    $show bash "${robotwin:-ROBOTWIN}/policy/ROCKET/eval.sh" "$2" "$config" "$address" "$3" 0 "$split" "$4"
  done
  [ -z "$server" ] || { kill "$server" || true; wait "$server" || true; server=''; }
}

for seed in ${seeds//,/ }; do
  for task in ${tasks//,/ }; do
    for arm in ${arms//,/ }; do
      name=$task-$arm-seed$seed
      checkpoint=$out/runs/$name--30000_chkpt
      if [ ! -f "$checkpoint/run_config.json" ]; then
        $run "$python" vla-scripts/finetune.py --config_path experiments/recipes/pi0_robotwin_release.yaml \
          --recipe "${arm%-equal}" ${weights[$arm]:+--align_loss_coeff "${weights[$arm]}"} \
          --vla_path "$vla_path" --vggt_path "$teacher" --data_root_dir "$data" --dataset_name "robotwin_${task}_clean" \
          --seed "$seed" --run_root_dir "$out/runs" --run_id_override "$name" --resume True
      fi
      evaluate "$checkpoint" "$task" "$seed" "$name-$split"
    done
  done
done
