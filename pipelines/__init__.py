"""Moves batches to steps and numbers to MLflow; knows nothing of distillation itself."""

import os

# Ray reads these when it is first imported, wherever that is, and hands them on to its workers.
_SETTINGS = {
    "RAY_AUTH_MODE": "token",  # said, not left to what a home directory happens to hold
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # `cluster.work_in` says where workers work
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # a report waits for the controller's next look: 2 s each by default
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, not only its trials
    "RAY_AIR_NEW_OUTPUT": "0",  # the other one prints tables at any verbosity
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
