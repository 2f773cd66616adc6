#!/bin/bash
# Starts the page. The store comes from the private data set BACKUP_REPO, and goes back there every two minutes and when
# the Space stops: the disk of a Space is lost at every restart.
set -eu

: "${BACKUP_REPO:?set the variable BACKUP_REPO of this Space to the private data set, as owner/name}"
: "${HF_TOKEN:?set the secret HF_TOKEN of this Space to a token that can write to $BACKUP_REPO}"
: "${SPACE_HOST:?set SPACE_HOST to the public host name; a Space sets it by itself}"

# Spaces set SPACE_HOST to the public host name, and end https in a proxy of their own. `exec`, so that the signal at the
# end reaches the server, which then saves what is new.
exec hf-rlhf collect serve \
    --store "$HOME/judgments.sqlite" \
    --backup_repo "$BACKUP_REPO" \
    --host 0.0.0.0 \
    --port "${PORT:-7860}" \
    --url "https://$SPACE_HOST" \
    --trusted_proxy true
