package rivals

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// haproxyFiles configures HAProxy for re-encryption with reuse of connections.
func haproxyFiles(c Config, f files, _ string) (process.Config, error) {
	var text strings.Builder
	fmt.Fprintf(&text, `global
  log %s len 1024 local0
  nbthread %d
  maxconn %d
  tune.ssl.default-dh-param 2048
defaults
  mode http
  log global
  option httplog
  option forwardfor
  timeout connect 5s
  timeout client 75s
  timeout server 75s
  timeout http-keep-alive 75s
  timeout http-request 20s
frontend up
  bind %s
  http-request return status 204
`, filepath.Join(c.Dir, logSocket), c.Threads, c.Connections, f.probe)
	for i, site := range c.Sites {
		alpn := "http/1.1"
		if site.HTTP2 {
			alpn = "h2"
		}
		fmt.Fprintf(&text, `frontend site%[1]d
  bind %[2]s ssl crt %[3]s alpn h2,http/1.1
  http-request set-header X-Forwarded-Proto https
  default_backend pool%[1]d
backend pool%[1]d
  http-reuse always
  server one %[4]s ssl verify required ca-file %[5]s sni str(%[6]s) alpn %[7]s
`, i, site.Address, f.both, site.Backend, f.authority, peers.ServerName, alpn)
	}
	path := filepath.Join(c.Dir, "haproxy.cfg")
	return process.Config{Args: []string{"-db", "-f", path}}, os.WriteFile(path, []byte(text.String()), 0o600)
}
