"""The names of a run's files, for what writes them and for what only reads them."""

from __future__ import annotations

from examples.training.replacing import CONFIG, REPLACED

__all__ = ["CONFIG", "REPLACED"]
ENVIRONMENT, RESULTS = "env.json", "all_results.json"
METRICS, LOG, CURVE = "metrics.jsonl", "log.jsonl", "learning_curve.png"
PLOTS, SUBMISSION = "plots", "submission"
RANK_CURVE, BUDGET_CURVE = "rank_curve.json", "budget_curve.json"
MASK_SHARES = "mask_shares.json"  # module -> mean of its final mask
PROOF = frozenset({"output_dir", "method", "model_name_or_path"})  # a run's config.json has these
# Options that do not change what is computed: a run may be resumed with others.
NOT_PART_OF_A_RUN = frozenset(
    "output_dir overwrite_output_dir resume_from_checkpoint do_train do_eval do_predict data_dir "
    "cache cache_dir local_files_only logging_steps report_to project_prefix disable_tqdm "
    "save_total_limit max_predict_samples test_file per_device_eval_batch_size plots "
    "calibration".split()
)
