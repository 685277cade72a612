#!/usr/bin/env bash
# Draws report.png, the picture of the README: the first page of the demo's report. Needs a finished demo and Chromium.
#   bash docs/images/draw.sh [STORAGE_ROOT]      (PYTHON=... names another interpreter than .venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/../.."
page=$("${PYTHON:-.venv/bin/python}" -m pipeline report workloads/demo.yaml --set storage.root="${1:-runs}" |
  sed -n 's/^report  *//p')
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$profile" --hide-scrollbars --window-size=1200,700 \
  --virtual-time-budget=10000 --screenshot=docs/images/report.png "file://$(realpath "$page")" 2>/dev/null
stat --format '%n %s bytes' docs/images/report.png
