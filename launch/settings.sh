# shellcheck shell=bash
# Sourced by the scripts beside it: settings are environment variables, and --dry-run prints commands instead of running.

need() { # NAME MEANING: refuses a setting that is missing
  if [[ -z "${!1:-}" ]]; then
    echo "error: $1 is not set: $2; put $1=... before the command" >&2
    exit 2
  fi
}

run() { # COMMAND...: runs it, or prints it ready to be pasted
  if [[ "${dry_run:-}" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

quoted() { # ARGUMENT...: one line that a shell reads back as the same arguments
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}
