"""Names and help of all that we have on vLLM's /metrics page. Imports nothing: the reference is made of it."""

PREFIX = "apparate:"
COUNTERS = {  # field of the counts -> help
    "emitted": "Output tokens, exits included",
    "decode_tokens": "Output tokens but for the first of each answer",
    "decode_seconds": "Decode time of all requests; over decode_tokens it is the mean time per output token",
    "held": "Held exits checked by the full model",
    "held_accepted": "Held exits that were emitted: accepted drafts",
    "held_accepted_divergences": "Held exits emitted although the full model disagreed",
    "released": "Exits emitted before their remaining layers ran",
    "verified": "Released exits that have their verdict",
    "divergences": "Emitted tokens that differ from their verdict",
    "divergences_at_worst": "Divergences, and released exits that ended without a verdict: what the bound holds for",
    "regret_nats": "How much better the full model's best token was, summed over all divergences",
    "unverified": "Released exits whose request ended before their verdict",
    "verification_passes": "Passes through all layers",
    "draft_steps": "Runs of the first blocks and the ramp, each for one more exit of the requests that take part",
    "targets_met": "Requests that met their target of time per output token",
    "targets_missed": "Requests that were slower than their target",
    "fallbacks": "Times early exits failed and serving went on without them",
    "recoveries": "Times early exits came back after a failure",
}
FIELDS = {  # metric -> field of the counts, where they differ
    "decode_seconds": "decode_s",
    "held_accepted": "accepted",
    "held_accepted_divergences": "accepted_divergences",
}
TENANT_COUNTERS = {  # of each tenant
    "emitted": "Output tokens of the tenant",
    "divergences": "Output tokens of the tenant that differ from their verdict",
    "divergences_at_worst": "The tenant's divergences, and released exits that ended without a verdict",
    "unverified": "Released exits of the tenant whose request ended before their verdict",
    "decode_tokens": "Output tokens of the tenant but for the first of each answer",
    "decode_seconds": "Decode time of the tenant's requests",
    "targets_met": "Requests of the tenant that met their target of time per output token",
    "targets_missed": "Requests of the tenant that were slower than their target",
}
HISTOGRAMS = {  # distribution -> (name, help, what a unit of the metric is in the distribution's)
    "tpt_ms": ("time_per_output_token_seconds", "Time per output token of requests that ended", 1e3),
    "tokens_per_pass": ("tokens_per_pass", "Tokens a request gets of one verification pass", 1.0),
    "verify_ms": ("verification_pass_seconds", "Time of an engine step without its draft steps", 1e3),
    "draft_step_ms": ("draft_step_seconds", "Time of a draft step", 1e3),
    "controller_ms": ("controller_seconds", "Time of the controller's decisions, per engine step", 1e3),
    "regret_nats": ("divergence_regret_nats", "Regret of a divergence", 1.0),
}
GAUGES = {
    "active": "1 while exits are made, 0 after a failure until they come back",
    "pause_seconds": "After a failure: time until exits come back by themselves, at the next request",
    "divergence_ratio": "Share of emitted tokens that are divergences",
    "divergences_at_worst_ratio": "Share of emitted tokens that are divergences or ended without a verdict",
    "outstanding": "Released exits that wait for their verdict",
    "accuracy_bound": "Largest share of emitted tokens that may be divergences",
    "budget_left": "Divergences (or nats) that the bound allows now",
    "budget_fill_ratio": "Budget saved up, as a share of the most it can hold",
    "tpt_target_seconds": "Time per output token aimed at",
    "depth": "Decoder blocks before the ramp in use",
    "max_exits": "Most exits per request and engine step",
    "threshold": "Confidence from which policy static releases",
}
EXITS = ("exits", "Exits by ramp depth and what became of them")
STATUS_ERRORS = ("status_errors", "Times the engine was asked for these figures and did not answer")
STATUS_AGE = ("status_age_seconds", "Time since the engine gave these figures")
