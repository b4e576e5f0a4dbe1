{{- define "crynux-cluster.configFile" -}}/etc/crynux-cluster/config/operator.yaml{{- end -}}

{{- /* The operator's configuration, in JSON: it is YAML too, and an address stays text in it. */ -}}
{{- define "crynux-cluster.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $etc := "/etc/crynux-cluster" -}}
{{- $var := "/var/lib/crynux-cluster" -}}
{{- $key := printf "%s/key/key" $etc -}}
{{- $identity := eq .Values.identity.kind "seed" | ternary
  (dict "seed_file" $key)
  (dict "keystore_file" $key "password_file" (printf "%s/key/password" $etc)) -}}
{{- $urls := dict "rpc_url_file" (printf "%s/network/rpc" $etc) "relay_url_file" (printf "%s/network/relay" $etc) -}}
{{- if .Values.network.wsUrlName -}}
{{- $_ := set $urls "ws_url_file" (printf "%s/network/ws" $etc) -}}
{{- end -}}
{{- $journal := eq .Values.journal.kind "postgresql" | ternary
  (dict "url_file" (printf "%s/journal/url" $etc))
  (dict "url" (printf "sqlite:///%s/journal.db" $var)) -}}
{{- $serve := dict "host" "0.0.0.0" "port" .Values.api.port "open_reads" .Values.api.openReads -}}
{{- if .Values.api.existingSecret -}}
{{- $_ := set $serve "token_file" (printf "%s/api/token" $etc) -}}
{{- end -}}
{{- $models := dict "root" (printf "%s/models" $var) -}}
{{- if .Values.models.huggingface.existingSecret -}}
{{- $_ := set $models "hub" (dict "token_file" (printf "%s/huggingface/token" $etc)) -}}
{{- end -}}
{{- if .Values.models.civitai.existingSecret -}}
{{- $_ := set $models "web" (dict "civitai_token_file" (printf "%s/civitai/token" $etc)) -}}
{{- end -}}
{{- if .Values.models.proxy.existingSecret -}}
{{- $_ := set $models "proxy_file" (printf "%s/proxy/url" $etc) -}}
{{- end -}}
{{- if .Values.models.ca.existingSecret -}}
{{- $_ := set $models "ca_file" (printf "%s/ca/bundle" $etc) -}}
{{- end -}}
{{- $slots := list -}}
{{- range .Values.gpuGroups -}}
{{- if hasKey . "slots" -}}
{{- $slots = append $slots (dict "gpu" .gpuName "slots" .slots) -}}
{{- end -}}
{{- end -}}
{{- if $slots -}}
{{- $_ := set $config "fleet" (merge (dict "slots_by_gpu" (uniq $slots)) ($config.fleet | default (dict))) -}}
{{- end -}}
{{- $ours := dict
  "identity" (merge (dict "accounts" .Values.identity.accounts) $identity)
  "network" $urls
  "ray" (dict "address" "127.0.0.1:6379")
  "journal" $journal
  "artifacts" (dict "path" (printf "%s/artifacts" $var))
  "models" $models
  "serve" $serve -}}
{{- mergeOverwrite $config $ours | toPrettyJson -}}
{{- end -}}

{{- define "crynux-cluster.rayNamespace" -}}
{{- dig "ray" "namespace" "crynux" .Values.config -}}
{{- end -}}
