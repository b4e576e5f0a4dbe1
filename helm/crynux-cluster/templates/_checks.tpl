{{- /* What the schema can't say. The first thing that is wrong ends the rendering, with one line that says
what to do; nothing is looked up in a cluster, so it is the same wherever it is rendered. */ -}}
{{- define "crynux-cluster.check" -}}
{{- $name := include "crynux-cluster.fullname" . -}}
{{- if not (regexMatch "^[a-z][a-z0-9-]*$" $name) -}}
{{- fail (printf "the name %q: KubeRay wants a lower-case letter first, then letters, digits and dashes; set fullnameOverride" $name) -}}
{{- end -}}
{{- include "crynux-cluster.checkSecrets" . -}}
{{- include "crynux-cluster.checkLabels" (dict "where" "commonLabels" "labels" .Values.commonLabels) -}}
{{- range $which, $what := pick .Values.monitoring "podMonitor" "rules" "dashboards" -}}
{{- include "crynux-cluster.checkLabels" (dict "where" (printf "monitoring.%s.labels" $which) "labels" $what.labels) -}}
{{- end -}}
{{- include "crynux-cluster.checkLabels" (dict "where" "head.labels" "labels" .Values.head.labels) -}}
{{- include "crynux-cluster.checkEnv" (dict "where" "head.env" "env" .Values.head.env) -}}
{{- range $which := list "resources" "supervisorResources" -}}
{{- include "crynux-cluster.checkOrder" (dict "where" (printf "head.%s" $which) "resources" (index $.Values.head $which)) -}}
{{- end -}}
{{- include "crynux-cluster.checkConfig" . -}}
{{- include "crynux-cluster.checkApi" . -}}
{{- include "crynux-cluster.checkGroups" . -}}
{{- if .Values.monitoring.rules.enabled -}}
{{- if not (.Files.Get "files/rules.yaml") -}}
{{- fail "monitoring.rules: the chart's files are missing, because symbolic links were dropped from the checkout; use what `helm package` makes of the chart" -}}
{{- end -}}
{{- end -}}
{{- if .Values.monitoring.dashboards.enabled -}}
{{- if not (.Files.Glob "files/dashboards/*.json") -}}
{{- fail "monitoring.dashboards: the chart's files are missing, because symbolic links were dropped from the checkout; use what `helm package` makes of the chart" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "crynux-cluster.checkSecrets" -}}
{{- range $which, $image := pick .Values.image "head" "worker" -}}
{{- if not $image.repository -}}
{{- fail (printf "image.%s.repository: missing; build the image from the Dockerfile and name where it was pushed" $which) -}}
{{- end -}}
{{- end -}}
{{- if not .Values.identity.existingSecret -}}
{{- fail "identity.existingSecret: missing; make a Secret with the operator's key and name it" -}}
{{- end -}}
{{- if not .Values.network.existingSecret -}}
{{- fail "network.existingSecret: missing; make a Secret with the URLs of RPC and relay and name it" -}}
{{- end -}}
{{- if eq .Values.journal.kind "postgresql" -}}
{{- if not .Values.journal.existingSecret -}}
{{- fail "journal.existingSecret: missing; a journal in PostgreSQL needs a Secret with its URL" -}}
{{- end -}}
{{- else if not .Values.head.persistence.enabled -}}
{{- fail "head.persistence.enabled: a journal in SQLite would be lost with the head pod; enable it, or set journal.kind to postgresql" -}}
{{- end -}}
{{- with .Values.ray.faultTolerance -}}
{{- if and .enabled (not (and .redisAddress .existingSecret)) -}}
{{- fail "ray.faultTolerance: redisAddress and existingSecret (Redis' password) are needed" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "crynux-cluster.checkConfig" -}}
{{- $network := .Values.config.network | default (dict) -}}
{{- if not $network.chain_id -}}
{{- fail "config.network.chain_id: missing" -}}
{{- end -}}
{{- range $contract := list "task" "node" "qos" -}}
{{- if not (dig "contracts" $contract "" $network) -}}
{{- fail (printf "config.network.contracts.%s: missing; the contract's address, in quotes" $contract) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "crynux-cluster.checkApi" -}}
{{- if not (or .Values.api.existingSecret .Values.api.openReads) -}}
{{- fail "api.existingSecret: missing; without a token nobody may read or act. Name a Secret, or set api.openReads" -}}
{{- end -}}
{{- if has (int .Values.api.port) (list 6379 8080 8265 10001 52365) -}}
{{- fail (printf "api.port: %d is Ray's; choose another" (int .Values.api.port)) -}}
{{- end -}}
{{- if and (ne .Values.service.type "ClusterIP") (not .Values.api.existingSecret) -}}
{{- fail (printf "service.type: %s needs api.existingSecret; without a token anyone would read" .Values.service.type) -}}
{{- end -}}
{{- with .Values.ingress -}}
{{- if and .enabled (not .host) -}}
{{- fail "ingress.host: missing" -}}
{{- end -}}
{{- if and .enabled (not $.Values.api.existingSecret) -}}
{{- fail "ingress.enabled: needs api.existingSecret; without a token anyone would read" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "crynux-cluster.checkGroups" -}}
{{- if not .Values.gpuGroups -}}
{{- fail "gpuGroups: missing; name at least one group of GPU nodes" -}}
{{- end -}}
{{- $names := list -}}
{{- $slots := dict -}}
{{- range .Values.gpuGroups -}}
{{- $where := printf "gpuGroups[%s]" .name -}}
{{- $group := include "crynux-cluster.group" . | fromJson -}}
{{- if has .name $names -}}
{{- fail (printf "%s: the name stands twice" $where) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- if and (hasKey . "replicas") (or (hasKey . "minReplicas") (hasKey . "maxReplicas")) -}}
{{- fail (printf "%s: give replicas, or minReplicas and maxReplicas" $where) -}}
{{- end -}}
{{- if and (hasKey . "slots") (not $group.gpuName) -}}
{{- fail (printf "%s.slots: needs gpuName, the driver's name for the cards (crynux-cluster gpus tells it)" $where) -}}
{{- end -}}
{{- if ne (dig $group.gpuName (toString .slots) $slots) (toString .slots) -}}
{{- fail (printf "%s.slots: another group has other slots for %s; an account belongs to a kind of card, not to a group" $where $group.gpuName) -}}
{{- end -}}
{{- if $group.gpuName -}}
{{- $_ := set $slots $group.gpuName (toString .slots) -}}
{{- end -}}
{{- if gt (int $group.least) (int $group.most) -}}
{{- fail (printf "%s: minReplicas is more than maxReplicas" $where) -}}
{{- end -}}
{{- if and $group.simulated (not (dig "network" "devnet" false $.Values.config)) -}}
{{- fail (printf "%s.simulated: refused on any chain that isn't marked a devnet (config.network.devnet)" $where) -}}
{{- end -}}
{{- if gt (int $group.graceSeconds) (int $.Values.head.graceSeconds) -}}
{{- fail (printf "%s.graceSeconds: more than head.graceSeconds (%d); at an upgrade all pods go together, and without the head nothing can be handed over" $where (int $.Values.head.graceSeconds)) -}}
{{- end -}}
{{- if regexMatch "(/mig-|\\.shared$)" $group.gpuResource -}}
{{- fail (printf "%s.gpuResource: %s is a part of a card; only whole cards can be used" $where $group.gpuResource) -}}
{{- end -}}
{{- include "crynux-cluster.checkLabels" (dict "where" (printf "%s.labels" $where) "labels" $group.labels) -}}
{{- include "crynux-cluster.checkEnv" (dict "where" (printf "%s.env" $where) "env" $group.env) -}}
{{- include "crynux-cluster.checkCache" (dict "root" $ "group" $group "where" $where) -}}
{{- include "crynux-cluster.checkOrder" (dict "where" (printf "%s.resources" $where) "resources" $group.resources) -}}
{{- include "crynux-cluster.checkMemory" (dict "root" $ "group" $group "where" $where) -}}
{{- end -}}
{{- end -}}

{{- define "crynux-cluster.checkCache" -}}
{{- $cache := .group.cache -}}
{{- if and (eq $cache.kind "existingClaim") (not $cache.existingClaim) -}}
{{- fail (printf "%s.cache.existingClaim: missing" .where) -}}
{{- end -}}
{{- if and (eq $cache.kind "claim") (ne $cache.accessMode "ReadWriteMany") (gt (int .group.most) 1) -}}
{{- fail (printf "%s.cache: %s is for one pod, and there may be %d; use ReadWriteMany, an existing claim, or kind ephemeral" .where $cache.accessMode (int .group.most)) -}}
{{- end -}}
{{- if eq $cache.kind "ephemeral" -}}
{{- $quota := dig "models" "quota_gb" 0 .root.Values.config | float64 -}}
{{- $room := divf (include "crynux-cluster.mebibytes" $cache.size | float64) 1024.0 -}}
{{- if or (le $quota 0.0) (gt $quota (mulf $room 0.95)) -}}
{{- fail (printf "%s.cache: a pod whose cache outgrows its size is evicted; set config.models.quota_gb to at most 95%% of %s" .where $cache.size) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "crynux-cluster.checkOrder" -}}
{{- $least := include "crynux-cluster.mebibytes" .resources.requests.memory | float64 -}}
{{- $most := include "crynux-cluster.mebibytes" .resources.limits.memory | float64 -}}
{{- if gt $least $most -}}
{{- fail (printf "%s: requests.memory (%s) is more than limits.memory (%s)" .where .resources.requests.memory .resources.limits.memory) -}}
{{- end -}}
{{- end -}}

{{- /* Both /dev/shm and models in host memory count against the pod's memory. */ -}}
{{- define "crynux-cluster.checkMemory" -}}
{{- $host := dig "gpu" "host_memory_gb" 8 .root.Values.config | float64 -}}
{{- $shm := include "crynux-cluster.mebibytes" .group.shm | float64 -}}
{{- $wanted := addf $shm (mulf $host 1024.0 (.group.gpusPerPod | float64)) 2048.0 -}}
{{- if lt (include "crynux-cluster.mebibytes" .group.resources.limits.memory | float64) $wanted -}}
{{- fail (printf "%s.resources.limits.memory: %s is too little for shm (%s), config.gpu.host_memory_gb (%v for each card) and 2Gi" .where .group.resources.limits.memory .group.shm $host) -}}
{{- end -}}
{{- end -}}

{{- define "crynux-cluster.checkLabels" -}}
{{- $where := .where -}}
{{- range $label, $_ := .labels -}}
{{- if regexMatch "^(app\\.kubernetes\\.io|helm\\.sh|ray\\.io)/" $label -}}
{{- fail (printf "%s: %s is set by this chart or by KubeRay; choose another" $where $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "crynux-cluster.checkEnv" -}}
{{- $where := .where -}}
{{- range .env -}}
{{- if regexMatch "(PASS|SECRET|TOKEN|CREDENTIAL|PRIVATE|_KEY|^KEY|^RAY_AUTH|^CRYNUX_)" (upper .name) -}}
{{- fail (printf "%s: %s; secrets are given by existingSecret, and what the chart sets isn't set twice" $where .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
