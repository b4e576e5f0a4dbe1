{{- /* The head's pod. Ray's container is the first: KubeRay takes that for Ray's. */ -}}
{{- define "crynux-cluster.head" -}}
{{- $head := .Values.head -}}
{{- $image := include "crynux-cluster.image" (dict "root" . "which" "head") -}}
metadata:
  labels:
    {{- include "crynux-cluster.podLabels" (dict "root" . "component" "head" "labels" $head.labels) | nindent 4 }}
  annotations:
    checksum/config: {{ include "crynux-cluster.config" . | sha256sum }}
    {{- with .Values.rollout }}
    crynux-cluster/rollout: {{ . | quote }}
    {{- end }}
    {{- with $head.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- /* Kubernetes' own five minutes come before anything that a person can do. */}}
  {{- $tolerations := $head.tolerations }}
  {{- range list "not-ready" "unreachable" }}
  {{- $tolerations = append $tolerations (dict "key" (printf "node.kubernetes.io/%s" .) "operator" "Exists" "effect" "NoExecute" "tolerationSeconds" $head.unreachableSeconds) }}
  {{- end }}
  {{- $where := merge (dict "tolerations" $tolerations) $head }}
  {{- include "crynux-cluster.pod" (dict "root" . "where" $where "grace" $head.graceSeconds) | nindent 2 }}
  # The supervisor joins Ray as a driver, and Ray finds its raylet by looking through the processes.
  shareProcessNamespace: true
  initContainers:
    # A Secret's file belongs to root and to the pod's group, so the group can read it, which the operator
    # refuses for a key. The copy, in memory, is its user's alone.
    - name: key
      image: {{ $image }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [install, -m, "0400", -t, /etc/crynux-cluster/key]
      args:
        - /etc/crynux-cluster/key-secret/key
        {{- if eq .Values.identity.kind "keystore" }}
        - /etc/crynux-cluster/key-secret/password
        {{- end }}
      resources:
        requests: {cpu: 50m, memory: 32Mi}
        limits: {cpu: 500m, memory: 64Mi}
      securityContext:
        {{- include "crynux-cluster.security" . | nindent 8 }}
      volumeMounts:
        - {name: key-secret, mountPath: /etc/crynux-cluster/key-secret, readOnly: true}
        - {name: key, mountPath: /etc/crynux-cluster/key}
  containers:
    - name: ray-head
      image: {{ $image }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      # KubeRay puts it before its "ray start": what a container left behind would be in the next one's way.
      command: [rm, -rf, /tmp/ray]
      env:
        {{- include "crynux-cluster.env" $head.env | nindent 8 }}
        {{- include "crynux-cluster.clientEnv" . | nindent 8 }}
      ports:
        - {name: gcs-server, containerPort: 6379, protocol: TCP}
        - {name: serve, containerPort: {{ .Values.api.port }}, protocol: TCP}
      resources:
        {{- $disks := $head.persistence.enabled | ternary (list $head.tmp) (list $head.tmp $head.persistence.size) }}
        {{- include "crynux-cluster.resources" (dict "resources" $head.resources "disks" $disks) | nindent 8 }}
      securityContext:
        {{- include "crynux-cluster.security" . | nindent 8 }}
      {{- include "crynux-cluster.rayProbes" . | nindent 6 }}
      lifecycle:
        {{- include "crynux-cluster.leave" (dict "root" . "grace" $head.graceSeconds) | nindent 8 }}
      volumeMounts:
        {{- include "crynux-cluster.headMounts" . | nindent 8 }}
        - {name: key, mountPath: /etc/crynux-cluster/key, readOnly: true}
    - name: supervisor
      image: {{ $image }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [/bin/sh, -c]
      args:
        - >-
          until ray health-check --address 127.0.0.1:6379 >/dev/null 2>&1; do sleep 2; done;
          exec crynux-cluster up --config {{ include "crynux-cluster.configFile" . }}
      env:
        {{- include "crynux-cluster.env" $head.env | nindent 8 }}
        {{- include "crynux-cluster.clientEnv" . | nindent 8 }}
        - {name: RAY_AUTH_TOKEN_PATH, value: /etc/crynux-cluster/ray/auth_token}
      resources:
        {{- toYaml $head.supervisorResources | nindent 8 }}
      securityContext:
        {{- include "crynux-cluster.security" . | nindent 8 }}
      # The API is the supervisor's to deploy, and to deploy again. Where Ray was begun anew under its feet it
      # may be left with a Ray that is gone: then it is begun anew too.
      startupProbe:
        httpGet: {path: /healthz, port: {{ .Values.api.port }}}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 60
      livenessProbe:
        httpGet: {path: /healthz, port: {{ .Values.api.port }}}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 18
      readinessProbe:
        httpGet: {path: /readyz, port: {{ .Values.api.port }}}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      volumeMounts:
        {{- include "crynux-cluster.headMounts" . | nindent 8 }}
        - {name: ray-token, mountPath: /etc/crynux-cluster/ray, readOnly: true}
  volumes:
    {{- include "crynux-cluster.headVolumes" . | nindent 4 }}
{{- end -}}

{{- /* So that crynux-cluster status and the like need no options in the pod. */ -}}
{{- define "crynux-cluster.clientEnv" -}}
- {name: CRYNUX_URL, value: {{ printf "http://127.0.0.1:%d" (int .Values.api.port) | quote }}}
{{- if .Values.api.existingSecret }}
- {name: CRYNUX_TOKEN_FILE, value: /etc/crynux-cluster/api/token}
{{- end }}
{{- end -}}

{{- define "crynux-cluster.headMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: config, mountPath: /etc/crynux-cluster/config, readOnly: true}
- {name: network, mountPath: /etc/crynux-cluster/network, readOnly: true}
{{- if eq .Values.journal.kind "postgresql" }}
- {name: journal, mountPath: /etc/crynux-cluster/journal, readOnly: true}
{{- end }}
{{- if .Values.api.existingSecret }}
- {name: api, mountPath: /etc/crynux-cluster/api, readOnly: true}
{{- end }}
- {name: data, mountPath: /var/lib/crynux-cluster}
{{- end -}}

{{- define "crynux-cluster.headVolumes" -}}
{{- $name := include "crynux-cluster.fullname" . -}}
{{- $claim := .Values.head.persistence -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.head.tmp }}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.head.shm }}}
- name: config
  configMap: {name: {{ $name }}-config}
- name: key
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
- name: key-secret
  secret:
    secretName: {{ .Values.identity.existingSecret }}
    defaultMode: 0400
    items:
      - {key: {{ .Values.identity.keyName }}, path: key}
      {{- if eq .Values.identity.kind "keystore" }}
      - {key: {{ .Values.identity.passwordName }}, path: password}
      {{- end }}
- name: network
  secret:
    secretName: {{ .Values.network.existingSecret }}
    defaultMode: 0400
    items:
      - {key: {{ .Values.network.rpcUrlName }}, path: rpc}
      - {key: {{ .Values.network.relayUrlName }}, path: relay}
      {{- with .Values.network.wsUrlName }}
      - {key: {{ . }}, path: ws}
      {{- end }}
{{- if eq .Values.journal.kind "postgresql" }}
- name: journal
  {{- include "crynux-cluster.secret" (dict "name" .Values.journal.existingSecret "key" .Values.journal.urlName "path" "url") | nindent 2 }}
{{- end }}
{{- with .Values.api.existingSecret }}
- name: api
  {{- include "crynux-cluster.secret" (dict "name" . "key" $.Values.api.tokenName "path" "token") | nindent 2 }}
{{- end }}
- name: ray-token
  {{- $token := .Values.ray.auth.existingSecret | default $name }}
  {{- include "crynux-cluster.secret" (dict "name" $token "key" "auth_token" "path" "auth_token") | nindent 2 }}
- name: data
  {{- if $claim.enabled }}
  persistentVolumeClaim: {claimName: {{ $claim.existingClaim | default (printf "%s-data" $name) }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ $claim.size }}}
  {{- end }}
{{- end -}}

{{- define "crynux-cluster.secret" -}}
secret:
  secretName: {{ .name }}
  defaultMode: 0400
  items:
    - {key: {{ .key }}, path: {{ .path }}}
{{- end -}}

{{- /* Before the pod goes, its cards finish what they compute; on the head, all do. */ -}}
{{- define "crynux-cluster.leave" -}}
preStop:
  exec:
    command:
      - crynux-cluster
      - leave
      - --namespace
      - {{ include "crynux-cluster.rayNamespace" .root }}
      - --timeout
      - {{ sub (int .grace) 30 | quote }}
{{- end -}}
