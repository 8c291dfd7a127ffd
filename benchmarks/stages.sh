# Sourced by demo.sh and benchmarks/real_parts/demo.sh, once $OUTPUT is set: stages that a later call skips.
TITLE="" # of the stage that runs, for the message if it fails
REDO=""  # set once a stage has run: the results of later stages are then out of date
trap '[ -z "$TITLE" ] || echo "demo.sh: stopped in stage \"$TITLE\"; the same command resumes there" >&2' EXIT

stage() { # stage NAME TITLE COMMAND...: run the command unless it succeeded in an earlier demo; remember its seconds
    _done="$OUTPUT/.done-$1"
    TITLE=$2
    shift 2
    if [ -z "$REDO" ] && [ -f "$_done" ]; then
        echo "== $TITLE: done before (took $(cat "$_done") s)" >&2
    else
        echo "== $TITLE" >&2
        rm -f "$_done"
        REDO=yes
        _start=$(date +%s)
        "$@"
        echo $(($(date +%s) - _start)) > "$_done.part"
        mv "$_done.part" "$_done"
        echo "== $TITLE: $(cat "$_done") s" >&2
    fi
    TIMES="${TIMES-}$(printf '%6d s  %s' "$(cat "$_done")" "$TITLE")
"
    TITLE=""
}
