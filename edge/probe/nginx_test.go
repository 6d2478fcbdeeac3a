package probe

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// startNginx runs nginx with lines added to its server block.
func startNginx(t *testing.T, a *authority, lines string) string {
	t.Helper()
	program, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("nginx is not installed")
	}
	certFile, keyFile := a.files(a.issue("nginx"))
	dir, address := t.TempDir(), freeAddress(t)
	config := fmt.Sprintf(`daemon off; master_process off; worker_processes 1; pid %[1]s/pid; error_log stderr warn;
events { worker_connections 64; }
http {
  access_log off; client_body_temp_path %[1]s/a; proxy_temp_path %[1]s/b; fastcgi_temp_path %[1]s/c; uwsgi_temp_path %[1]s/d; scgi_temp_path %[1]s/e;
  server {
    listen %[2]s ssl; ssl_certificate %[3]s; ssl_certificate_key %[4]s; ssl_session_cache shared:probe:1m;
    location / { return 200 "hello\n"; }
    %[5]s
  }
}
`, dir, address, certFile, keyFile, lines)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	startProcess(t, address, exec.Command(program, "-c", file, "-p", dir, "-e", "stderr"))
	return address
}

func TestNginxSessionIDs(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startNginx(t, a, "ssl_protocols TLSv1.2; ssl_session_tickets off; keepalive_timeout 7s 5s; keepalive_requests 9;")
	r := probe(t, Config{Address: address, Roots: a.roots()})
	v := version(t, r, tls12)
	if v.Mechanism != resealv1.Mechanism_MECHANISM_SESSION_ID || survival(v, endNotify).Answer != answerYes {
		t.Errorf("TLS 1.2: %v", v)
	}
	if r.KeepAlive.Reusable != answerYes || r.KeepAlive.KeepAlive != "timeout=5" || r.Pool.GetConnections().GetIdleTimeout().AsDuration() != 4*time.Second {
		t.Errorf("keep-alive %v, pool %v", r.KeepAlive, r.Pool)
	}
}

func TestNginxTickets(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startNginx(t, a, "ssl_protocols TLSv1.2 TLSv1.3; ssl_session_timeout 5m; keepalive_timeout 0;")
	r := probe(t, Config{Address: address, Roots: a.roots()})
	old, newest := version(t, r, tls12), version(t, r, tls13)
	if old.Mechanism != resealv1.Mechanism_MECHANISM_TICKET || newest.Mechanism != resealv1.Mechanism_MECHANISM_PSK ||
		newest.LifetimeHint.AsDuration() != 5*time.Minute || newest.SingleUse != answerNo {
		t.Errorf("TLS 1.2: %v\nTLS 1.3: %v", old, newest)
	}
	if r.KeepAlive.Reusable != answerNo || r.KeepAlive.Connection != "close" || !strings.Contains(r.Advice, "live for only 5m0s") {
		t.Errorf("keep-alive %v, advice %q", r.KeepAlive, r.Advice)
	}
}
