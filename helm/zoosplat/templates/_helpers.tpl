{{- define "zoosplat.labels" -}}
app.kubernetes.io/name: zoosplat
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "zoosplat.flowsImage" -}}
{{ .Values.runner.images.registry }}/zoosplat-flows:{{ .Values.runner.images.tag }}
{{- end }}

{{- define "zoosplat.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "zoosplat.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Variables of containers of the flows image: a list of name and value. */ -}}
{{- define "zoosplat.flowEnv" -}}
- {name: HOME, value: /tmp}
- {name: PREFECT_API_URL, value: {{ .Values.flow.apiUrl | quote }}}
- {name: PREFECT_SERVER_ANALYTICS_ENABLED, value: "false"}
- {name: DO_NOT_TRACK, value: "1"}
- {name: ZOOSPLAT_SETTINGS, value: /etc/zoosplat/settings.yaml}
- {name: ZOOSPLAT_S3_ONLY, value: "1"}
- {name: AWS_DEFAULT_REGION, value: {{ .Values.runner.s3.region | quote }}}
{{- with .Values.runner.s3.endpoint }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- range $name, $value := .Values.flow.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- with .Values.runner.s3.secretName }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- {name: {{ . }}, valueFrom: {secretKeyRef: {name: {{ $.Values.runner.s3.secretName }}, key: {{ . }}}}}
{{- end }}
{{- end }}
{{- end }}
