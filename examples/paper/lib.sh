# Sourced by the scripts beside it: what several of them do.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
DEVICE=${DEVICE:-cpu}

# once VERB FOLDER OPTION...: a run of fit or train unless it is finished; an interrupted one goes on.
once() {
  local verb=$1 folder=$2 resume=
  shift 2
  if grep -qs '"status": "finished"' "$folder/config.json"; then return; fi
  if [ -e "$folder/config.json" ]; then resume=--resume; fi
  ebm-prior "$verb" --out "$folder" "$@" --device "$DEVICE" $resume
}

# kept FILE COMMAND...: what a command prints, from the file where it was kept before.
kept() {
  local file=$1
  shift
  if [ ! -e "$file" ]; then
    mkdir -p "$(dirname "$file")"
    "$@" >"$file.new"
    mv "$file.new" "$file"
  fi
  cat "$file"
}

# stage_two CKPT OPTION...: heads of every kind in KINDS on a frozen backbone, before and after.
stage_two() {
  local ckpt=$1 kind
  shift
  for kind in ${KINDS:-factorized joint}; do
    once fit "$OUT/$kind" --ckpt "$ckpt" --heads "$kind" ${DATA:+--data "$DATA"} ${FIT:-}
    echo "$kind heads:"
    kept "$OUT/$kind-n$N.txt" ebm-prior evaluate --heads "$OUT/$kind" -n "$N" \
      --device "$DEVICE" ${FEATURES:+--features "$FEATURES"} "$@"
  done
}
