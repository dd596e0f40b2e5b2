# Sourced by the scripts beside it: what several of them do.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
DEVICE=${DEVICE:-cpu}

# same RESULT WORD...: remember what a run or file was begun with; if it exists, refuse anything else.
same() {
  local result=$1
  shift
  mkdir -p "$(dirname "$result")"
  if [ -e "$result" ] && [ "$(cat "$result.settings" 2>/dev/null)" != "$*" ]; then
    echo "Error: $result was begun with other settings; choose another OUT" >&2
    exit 1
  fi
  echo "$*" >"$result.settings"
}

# once VERB FOLDER OPTION...: a run of fit or train unless it is finished; an interrupted one goes on.
once() {
  local verb=$1 folder=$2 resume=
  shift 2
  same "$folder" "$verb" "$@"
  if grep -qs '"status": "finished"' "$folder/config.json"; then return; fi
  if [ -e "$folder/config.json" ]; then resume=--resume; fi
  ebm-prior "$verb" --out "$folder" "$@" --device "$DEVICE" $resume
}

# kept FILE COMMAND...: what a command prints, from the file where it was kept before.
kept() {
  local file=$1
  shift
  same "$file" "$@"
  if [ ! -e "$file" ]; then
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
