{{- define "crynux-cluster.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $full := .Values.fullnameOverride | default (contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) -}}
{{- /* KubeRay adds "-head-svc" and cuts what is longer than 50 characters. */ -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "crynux-cluster.selector" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "crynux-cluster.labels" -}}
{{- include "crynux-cluster.labelsAnd" (dict "root" . "more" (dict)) -}}
{{- end -}}

{{- define "crynux-cluster.labelsAnd" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: crynux-cluster
{{ include "crynux-cluster.selector" .root }}
{{- with mergeOverwrite (dict) .root.Values.commonLabels .more }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Of Ray's pods. Nothing in them may change with the chart's version: any change makes all pods anew. And
KubeRay's head Service selects by app.kubernetes.io/name and created-by as KubeRay sets them: leave them alone. */ -}}
{{- define "crynux-cluster.podLabels" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/part-of: crynux-cluster
app.kubernetes.io/component: {{ .component }}
{{- with mergeOverwrite (dict) .root.Values.commonLabels .labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "crynux-cluster.serviceAccount" -}}
{{- $made := .Values.serviceAccount.create | ternary (include "crynux-cluster.fullname" .) "default" -}}
{{- .Values.serviceAccount.name | default $made -}}
{{- end -}}

{{- define "crynux-cluster.image" -}}
{{- $image := index .root.Values.image .which -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default (printf "%s-%s" .root.Chart.AppVersion (eq .which "head" | ternary "cpu" "cuda")) }}
{{- end -}}
{{- end -}}

{{- define "crynux-cluster.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.user }}
runAsGroup: {{ .Values.security.group }}
fsGroup: {{ .Values.security.group }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "crynux-cluster.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ .Values.security.readOnlyRootFilesystem }}
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* What every pod of Ray has: where it runs, and as whom. */ -}}
{{- define "crynux-cluster.pod" -}}
serviceAccountName: {{ include "crynux-cluster.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ .grace }}
securityContext:
  {{- include "crynux-cluster.podSecurity" .root | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "runtimeClassName" }}
{{- with index $.where $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* The token is a file for the supervisor; KubeRay gives it to Ray's own containers. Ray isn't to wait for its
actors to go: they never do by themselves, and crynux-cluster leave has emptied the machine. Of what Ray itself logs,
only what is wrong stands among the operator's lines. Its processes yield by actors/precedence.py, not all alike. What `env` of the values sets, it sets. */ -}}
{{- define "crynux-cluster.env" -}}
{{- $env := dict
  "HOME" "/tmp"
  "HF_HOME" "/tmp/huggingface"
  "RAY_AUTH_MODE" "token"
  "RAY_USAGE_STATS_ENABLED" "0"
  "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "0"
  "RAY_BACKEND_LOG_LEVEL" "warning"
  "RAY_LOGGER_LEVEL" "warning"
  "RAY_worker_niceness" "0"
  "PROMETHEUS_DISABLE_CREATED_SERIES" "true"
-}}
{{- range . }}{{ $_ := set $env .name .value }}{{ end -}}
{{- range $name, $value := $env }}
- {{ dict "name" $name "value" $value | toJson }}
{{- end }}
{{- end -}}

{{- /* Of the pod's own agent, which says how the raylet is, and on the head the GCS. The hook that empties the pod is
run before this end too, and asks a Ray that doesn't answer: it isn't given the time that a pod that goes has. */ -}}
{{- define "crynux-cluster.rayProbes" -}}
{{- $get := "{path: /api/healthz, port: 52365}" -}}
startupProbe:
  httpGet: {{ $get }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
  terminationGracePeriodSeconds: 30
livenessProbe:
  httpGet: {{ $get }}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 12
  terminationGracePeriodSeconds: 30
readinessProbe:
  httpGet: {{ $get }}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 3
{{- end -}}

{{- /* KubeRay takes these as text. */ -}}
{{- define "crynux-cluster.rayStartParams" -}}
num-cpus: {{ .cpus | quote }}
{{- if hasKey . "gpus" }}
num-gpus: {{ .gpus | quote }}
{{- end }}
object-store-memory: "268435456"
{{- /* What coordinator, cards and API log is the container's output, for whoever collects that: a file in the
container would be gone with it. */}}
no-redirect-output: "true"
dashboard-agent-listen-port: "52365"
{{- end -}}

{{- /* What a container is given; asked for with it, unless the values speak of it: the room on the machine's disk that
its pod's volumes may take, lest the pod comes where it would be evicted. */ -}}
{{- define "crynux-cluster.resources" -}}
{{- $found := deepCopy .resources -}}
{{- $disk := 0 -}}
{{- range .disks -}}
{{- $disk = add $disk (include "crynux-cluster.mebibytes" . | int64) -}}
{{- end -}}
{{- if not (or (hasKey $found.requests "ephemeral-storage") (hasKey $found.limits "ephemeral-storage")) -}}
{{- $_ := set $found.requests "ephemeral-storage" (printf "%dMi" $disk) -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{- /* Mi of a quantity in Mi, Gi or Ti. */ -}}
{{- define "crynux-cluster.mebibytes" -}}
{{- $text := toString . -}}
{{- if hasSuffix "Ti" $text -}}{{ mul (trimSuffix "Ti" $text | int64) 1048576 }}
{{- else if hasSuffix "Gi" $text -}}{{ mul (trimSuffix "Gi" $text | int64) 1024 }}
{{- else -}}{{ trimSuffix "Mi" $text | int64 }}
{{- end -}}
{{- end -}}

{{- /* An entry of gpuGroups with its defaults, as JSON. */ -}}
{{- define "crynux-cluster.group" -}}
{{- $defaults := dict
  "gpuResource" "nvidia.com/gpu" "gpusPerPod" 1 "gpuName" "" "simulated" (dict)
  "nodeSelector" (dict) "tolerations" list "affinity" (dict) "runtimeClassName" "" "priorityClassName" ""
  "resources" (dict "requests" (dict "cpu" "4" "memory" "24Gi") "limits" (dict "cpu" "8" "memory" "24Gi"))
  "shm" "2Gi" "tmp" "20Gi" "graceSeconds" 600 "labels" (dict) "annotations" (dict) "env" list
  "cache" (dict "kind" "claim" "size" "200Gi" "storageClass" "" "accessMode" "ReadWriteOnce" "existingClaim" "" "annotations" (dict))
-}}
{{- $group := mergeOverwrite $defaults (deepCopy .) -}}
{{- $least := hasKey . "replicas" | ternary .replicas .minReplicas | default 0 -}}
{{- $most := hasKey . "replicas" | ternary .replicas .maxReplicas | default $least -}}
{{- if not (or (hasKey . "replicas") (hasKey . "minReplicas") (hasKey . "maxReplicas")) -}}
{{- $least = 1 -}}{{- $most = 1 -}}
{{- end -}}
{{- merge (dict "least" $least "most" $most) $group | toJson -}}
{{- end -}}

{{- /* "private" for a host that is no public one by its name or address: a rule for everyone doesn't lead to it, and
opens its port to the world instead. */ -}}
{{- define "crynux-cluster.private" -}}
{{- $host := regexReplaceAll ":[0-9]+$" . "" | trimPrefix "[" | trimSuffix "]" | lower -}}
{{- $networks := "^(10|127|169\\.254|172\\.(1[6-9]|2[0-9]|3[01])|192\\.168|100\\.(6[4-9]|[7-9][0-9]|1[01][0-9]|12[0-7]))\\.[0-9.]+$" -}}
{{- if or (regexMatch $networks $host) (regexMatch "^(::1$|f[cd][0-9a-f]{2}:|fe80:)" $host) (regexMatch "(^[a-z0-9-]+|\\.(svc|local|localdomain|internal|lan|home\\.arpa))$" $host) -}}
private
{{- end -}}
{{- end -}}

{{- /* Numbers of ports in those URLs of a list that are at public hosts, as JSON. */ -}}
{{- define "crynux-cluster.portsOf" -}}
{{- $ports := list -}}
{{- range compact . -}}
{{- $url := urlParse . -}}
{{- if not (include "crynux-cluster.private" $url.host) -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- $ports = append $ports ($port | default (eq $url.scheme "http" | ternary "80" "443") | int) -}}
{{- end -}}
{{- end -}}
{{- uniq $ports | toJson -}}
{{- end -}}
