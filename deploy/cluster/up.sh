#!/usr/bin/env bash
# Start a Kubernetes control plane on loopback: etcd, API server, controller manager, scheduler, and kwok for simulated nodes
# (those annotated kwok.x-k8s.io/node=fake). What runs already is left alone. KUBECONFIG is
# ~/.cache/zoosplat/cluster/kubeconfig.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
mkdir -p "$RUN/pki" "$RUN/etcd"
chmod 700 "$RUN"
cd "$RUN"
if [ ! -s pki/serving.crt ]; then
  openssl genrsa -out pki/sa.key 2048 2>/dev/null
  openssl rsa -in pki/sa.key -pubout -out pki/sa.pub 2>/dev/null
  openssl req -x509 -newkey rsa:2048 -nodes -keyout pki/ca.key -out pki/ca.crt -days 3650 -subj /CN=local-ca 2>/dev/null
  openssl req -newkey rsa:2048 -nodes -keyout pki/serving.key -out pki/serving.csr -subj /CN=localhost 2>/dev/null
  openssl x509 -req -in pki/serving.csr -CA pki/ca.crt -CAkey pki/ca.key -CAcreateserial -days 3650 -out pki/serving.part \
    -extfile <(echo "subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:kubernetes.default.svc") 2>/dev/null
  # The API server asks kubelets for logs with this certificate.
  openssl req -newkey rsa:2048 -nodes -keyout pki/client.key -out pki/client.csr -subj /O=system:masters/CN=apiserver 2>/dev/null
  openssl x509 -req -in pki/client.csr -CA pki/ca.crt -CAkey pki/ca.key -CAcreateserial -days 3650 -out pki/client.crt 2>/dev/null
  mv pki/serving.part pki/serving.crt
fi
if [ ! -s kubeconfig ]; then
  token=$(openssl rand -hex 16)
  (umask 077; echo "$token,admin,admin,\"system:masters\"" > tokens.csv; cat > kubeconfig.part <<END
apiVersion: v1
kind: Config
current-context: zoosplat
clusters: [{name: zoosplat, cluster: {server: "https://127.0.0.1:$PORT", certificate-authority: $RUN/pki/ca.crt}}]
users: [{name: admin, user: {token: $token}}]
contexts: [{name: zoosplat, context: {cluster: zoosplat, user: admin}}]
END
  )
  mv kubeconfig.part kubeconfig
fi
etcd=http://127.0.0.1:$((PORT + 1))
peers=http://127.0.0.1:$((PORT + 2))
# etcd does not wait for the disk, because down.sh removes its data.
start etcd . "$BIN/etcd" --data-dir "$RUN/etcd" --listen-client-urls "$etcd" --advertise-client-urls "$etcd" \
  --listen-peer-urls "$peers" --initial-advertise-peer-urls "$peers" --initial-cluster "default=$peers" --unsafe-no-fsync
start apiserver . "$BIN/kube-apiserver" --etcd-servers="$etcd" --service-account-key-file="$RUN/pki/sa.pub" \
  --service-account-signing-key-file="$RUN/pki/sa.key" --service-account-issuer=https://kubernetes.default.svc \
  --tls-cert-file="$RUN/pki/serving.crt" --tls-private-key-file="$RUN/pki/serving.key" --client-ca-file="$RUN/pki/ca.crt" \
  --token-auth-file="$RUN/tokens.csv" --authorization-mode=Node,RBAC --service-cluster-ip-range=10.96.0.0/16 \
  --bind-address=127.0.0.1 --advertise-address=127.0.0.1 --secure-port="$PORT" \
  --kubelet-client-certificate="$RUN/pki/client.crt" --kubelet-client-key="$RUN/pki/client.key" \
  --kubelet-preferred-address-types=Hostname --endpoint-reconciler-type=none
for _ in $(seq 240); do
  "$BIN/kubectl" get --raw /readyz > /dev/null 2>&1 && break
  if ! alive apiserver.pid; then
    echo "up.sh: the API server ended: $(tail -n 1 apiserver.log)" >&2
    exit 1
  fi
  sleep 0.5
done
start controllers . "$BIN/kube-controller-manager" --kubeconfig="$KUBECONFIG" --leader-elect=false --secure-port=0 \
  --service-account-private-key-file="$RUN/pki/sa.key" --root-ca-file="$RUN/pki/ca.crt" --use-service-account-credentials \
  --node-monitor-grace-period=20s
start scheduler . "$BIN/kube-scheduler" --kubeconfig="$KUBECONFIG" --leader-elect=false --secure-port=0
start kwok . "$BIN/kwok" --kubeconfig "$KUBECONFIG" --config "$BIN/kwok-stages.yaml" --manage-all-nodes=false \
  --manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake
for _ in $(seq 120); do
  "$BIN/kubectl" get serviceaccount default > /dev/null 2>&1 && break
  sleep 0.5
done
"$BIN/kubectl" version | sed -n 's/^Server Version: /cluster: Kubernetes /p'
