{{- /* The pods of one group: cards of one type. */ -}}
{{- define "crynux-cluster.worker" -}}
{{- $root := .root -}}
{{- $group := .group -}}
{{- $models := $root.Values.models -}}
{{- $resources := deepCopy $group.resources -}}
{{- if empty $group.simulated -}}
{{- $_ := set $resources.limits $group.gpuResource $group.gpusPerPod -}}
{{- $_ := set $resources.requests $group.gpuResource $group.gpusPerPod -}}
{{- end -}}
metadata:
  labels:
    {{- include "crynux-cluster.podLabels" (dict "root" $root "component" "worker" "labels" $group.labels) | nindent 4 }}
  {{- $annotations := deepCopy $group.annotations }}
  {{- with $root.Values.rollout }}
  {{- $_ := set $annotations "crynux-cluster/rollout" . }}
  {{- end }}
  {{- with $annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "crynux-cluster.pod" (dict "root" $root "where" $group "grace" $group.graceSeconds) | nindent 2 }}
  containers:
    - name: ray-worker
      image: {{ include "crynux-cluster.image" (dict "root" $root "which" "worker") }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [rm, -rf, /tmp/ray]
      env:
        {{- include "crynux-cluster.env" $group.env | nindent 8 }}
        {{- if $models.s3.existingSecret }}
        - {name: AWS_SHARED_CREDENTIALS_FILE, value: /etc/crynux-cluster/s3/credentials}
        {{- end }}
        - {name: AWS_EC2_METADATA_DISABLED, value: "true"}
      resources:
        {{- $disks := eq $group.cache.kind "ephemeral" | ternary (list $group.tmp $group.cache.size) (list $group.tmp) }}
        {{- include "crynux-cluster.resources" (dict "resources" $resources "disks" $disks) | nindent 8 }}
      securityContext:
        {{- include "crynux-cluster.security" $root | nindent 8 }}
      {{- include "crynux-cluster.rayProbes" $root | nindent 6 }}
      lifecycle:
        {{- include "crynux-cluster.leave" (dict "root" $root "grace" $group.graceSeconds) | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: models, mountPath: /var/lib/crynux-cluster/models}
        {{- range $kind := list "huggingface" "civitai" "proxy" "ca" "s3" }}
        {{- if (index $models $kind).existingSecret }}
        - {name: {{ $kind }}, mountPath: /etc/crynux-cluster/{{ $kind }}, readOnly: true}
        {{- end }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $group.tmp }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $group.shm }}}
    - name: models
      {{- if eq $group.cache.kind "claim" }}
      persistentVolumeClaim: {claimName: {{ printf "%s-models-%s" (include "crynux-cluster.fullname" $root) $group.name }}}
      {{- else if eq $group.cache.kind "existingClaim" }}
      persistentVolumeClaim: {claimName: {{ $group.cache.existingClaim }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $group.cache.size }}}
      {{- end }}
    {{- range $kind, $path := dict "huggingface" "token" "civitai" "token" "proxy" "url" "ca" "bundle" "s3" "credentials" }}
    {{- with index $models $kind }}
    {{- if .existingSecret }}
    - name: {{ $kind }}
      {{- include "crynux-cluster.secret" (dict "name" .existingSecret "key" (get . (printf "%sName" $path)) "path" $path) | nindent 6 }}
    {{- end }}
    {{- end }}
    {{- end }}
{{- end -}}
