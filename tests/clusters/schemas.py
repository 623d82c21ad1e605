"""Small schemas of our own, of documented fields only, with unknown keys refused.

KubeRay's fields are those of its API reference for ray.io/v1 (v1.6), compose's those of the Compose
Specification. Pod templates are left to Kubernetes' own schemas.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
YES: Schema = {"type": "boolean"}
ANYTHING: Schema = {"type": "object"}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
WORDS: Schema = {"type": "array", "items": STRING}


def of(required: list[str] | None = None, **fields: Schema) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": required or [],
        "additionalProperties": False,
    }


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


HEAD_GROUP = of(
    ["template"],
    template=ANYTHING,
    headService=ANYTHING,
    enableIngress=YES,
    labels=STRINGS,
    rayStartParams=STRINGS,
    resources=STRINGS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
)
WORKER_GROUP = of(
    ["groupName", "template", "maxReplicas"],
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    numOfHosts=COUNT,
    labels=STRINGS,
    rayStartParams=STRINGS,
    resources=STRINGS,
    scaleStrategy=of(workersToDelete=WORDS),
    suspend=YES,
    template=ANYTHING,
)
RAY_CLUSTER_SPEC = of(
    ["headGroupSpec", "rayVersion"],
    authOptions=of(
        ["mode"], mode=one_of("token", "disabled"), secretName=STRING, enableK8sTokenAuth=YES
    ),
    autoscalerOptions=of(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=COUNT,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        image=STRING,
        imagePullPolicy=STRING,
        resources=ANYTHING,
        securityContext=ANYTHING,
        env={"type": "array"},
        envFrom={"type": "array"},
        volumeMounts={"type": "array"},
    ),
    enableInTreeAutoscaling=YES,
    gcsFaultToleranceOptions=ANYTHING,
    headGroupSpec=HEAD_GROUP,
    headServiceAnnotations=STRINGS,
    managedBy=STRING,
    rayVersion=STRING,
    suspend=YES,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
)
RAY_JOB_SPEC = of(
    ["entrypoint"],
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    clusterSelector=STRINGS,
    entrypoint=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=STRING,
    jobId=STRING,
    metadata=STRINGS,
    rayClusterSpec=RAY_CLUSTER_SPEC,
    runtimeEnvYAML=STRING,
    shutdownAfterJobFinishes=YES,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=of(backoffLimit=COUNT),
    submitterPodTemplate=ANYTHING,
    suspend=YES,
    ttlSecondsAfterFinished=COUNT,
)


def kuberay(kind: str, spec: Schema) -> Schema:
    metadata = of(["name"], name=STRING, namespace=STRING, labels=STRINGS, annotations=STRINGS)
    return of(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion=one_of("ray.io/v1"),
        kind=one_of(kind),
        metadata=metadata,
        spec=spec,
    )


KUBERAY = {
    "RayCluster": kuberay("RayCluster", RAY_CLUSTER_SPEC),
    "RayJob": kuberay("RayJob", RAY_JOB_SPEC),
}

CONDITION = of(
    ["condition"],
    condition=one_of("service_started", "service_healthy", "service_completed_successfully"),
)
SERVICE = of(
    ["image"],
    image=STRING,
    build=STRING,
    command=WORDS,
    entrypoint=WORDS,
    environment={"type": "object", "additionalProperties": {"type": ["string", "number"]}},
    ports={"type": "array", "items": {"type": "string", "pattern": r"^127\.0\.0\.1:\S+:\d+$"}},
    volumes=WORDS,
    depends_on={"type": "object", "additionalProperties": CONDITION},
    healthcheck=of(["test"], test=WORDS, interval=STRING, timeout=STRING, retries=COUNT),
    restart=one_of("no", "always", "on-failure", "unless-stopped"),
)
COMPOSE = of(
    ["services"],
    name=STRING,
    services={"type": "object", "additionalProperties": SERVICE},
    volumes={"type": "object", "additionalProperties": of()},
)
