#!/usr/bin/env bash
# Figure 6: two arms without alignment, with spatial forcing and with ROCKET.
#   figure6.sh                                          a mini student in a bimanual simulator, on a CPU (figure6_mini.sh)
#   figure6.sh --profile paper --vla_path PI0_FOLDER --data_root_dir datasets/robotwin [--tasks A,B] [--robotwin CHECKOUT]
#     pi0 with LoRA in RoboTwin 2.0, the release's settings: a policy a task, 100 trials, easy (demo_clean) and hard
#     (demo_randomized). The figure has five tasks; the release names one of them, the default. Name the others yourself.
#     Without --robotwin, the evaluation's commands are printed: RoboTwin runs in an environment of its own.
#   More flags: --teacher_path --arms --seeds --out --unseen|--seen --dry_run.      PYTHON names another interpreter.
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
  mini) exec "$here/figure6_mini.sh" "$@" ;;
  paper) ;;
  *) usage "--profile: '$profile' found" ;;
esac

vla_path='' data='' teacher=facebook/VGGT-1B tasks=move_playingcard_away robotwin='' seeds=0 split=unseen run='' out=runs/reproduce/figure6
# The release trains ROCKET with 0.125 and spatial forcing with 0.5; the last two arms have the other one's weight.
arms=baseline,spatial_forcing,rocket,rocket-equal,spatial_forcing-equal
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
cd "$here/../.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=${PYTHON:-python}

for seed in ${seeds//,/ }; do
  for task in ${tasks//,/ }; do
    for arm in ${arms//,/ }; do
      case $arm in
        baseline) method=(--recipe baseline) ;;
        rocket) method=(--recipe rocket --align_loss_coeff 0.125) ;;
        rocket-equal) method=(--recipe rocket --align_loss_coeff 0.5) ;;
        spatial_forcing) method=(--recipe spatial_forcing --align_loss_coeff 0.5) ;;
        spatial_forcing-equal) method=(--recipe spatial_forcing --align_loss_coeff 0.125) ;;
        *) usage "--arms: $arm found" ;;
      esac
      name=$task-$arm-seed$seed
      checkpoint=$out/runs/$name--30000_chkpt
      if [ ! -f "$checkpoint/run_config.json" ]; then
        $run "$python" vla-scripts/finetune.py --config_path experiments/recipes/pi0_robotwin_release.yaml "${method[@]}" \
          --vla_path "$vla_path" --vggt_path "$teacher" --data_root_dir "$data" --dataset_name "robotwin_${task}_clean" \
          --seed "$seed" --run_root_dir "$out/runs" --run_id_override "$name" --resume True
      fi
      for config in demo_clean demo_randomized; do
        # 100 trials, from seed 100000 * (1 + seed) on, as RoboTwin's script has it.
        evaluate=(bash "${robotwin:-ROBOTWIN}/policy/ROCKET/eval.sh" "$task" "$config" "$(realpath -m "$checkpoint")" "$seed" 0 "$split")
        if [ -n "$robotwin" ]; then $run "${evaluate[@]}"; else echo "${evaluate[*]}"; fi
      done
    done
  done
done
