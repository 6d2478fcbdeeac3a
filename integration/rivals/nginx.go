package rivals

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// nginxFiles configures nginx for re-encryption with reuse of connections and
// sessions. Bodies are passed on as they come and written to no file. Connections
// take as many requests as clients want to make, so that all proxies do the same.
func nginxFiles(c Config, f files, version string) (process.Config, error) {
	// Workers of a root master would become nobody, who can't read the files.
	user := ""
	if os.Getuid() == 0 {
		user = "user root;\n"
	}
	var text strings.Builder
	fmt.Fprintf(&text, `%sdaemon off;
worker_processes %d;
pid nginx.pid;
error_log stderr error;
events { worker_connections %[3]d; }
http {
  access_log access.log;
  client_body_temp_path tmp-body; proxy_temp_path tmp-proxy; fastcgi_temp_path tmp-fastcgi;
  uwsgi_temp_path tmp-uwsgi; scgi_temp_path tmp-scgi;
  keepalive_requests 100000000;
  client_max_body_size 0;
  proxy_request_buffering off;
  proxy_max_temp_file_size 0;
  server { listen %[4]s; return 204; }
`, user, c.Threads, 2*c.Connections, f.probe)
	listen, more := "ssl http2", ""
	if !older(version, "1.25.1") {
		listen, more = "ssl", "http2 on;"
	}
	for i, site := range c.Sites {
		if site.HTTP2 {
			continue
		}
		fmt.Fprintf(&text, `  upstream pool%[1]d { zone pool%[1]d 1m; server %[2]s; keepalive 256; keepalive_requests 100000000; }
  server {
    listen %[3]s %[4]s backlog=4096; %[5]s
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_certificate %[6]s; ssl_certificate_key %[7]s;
    location / {
      proxy_pass https://pool%[1]d;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto https;
      proxy_ssl_server_name on;
      proxy_ssl_name %[8]s;
      proxy_ssl_protocols TLSv1.2 TLSv1.3;
      proxy_ssl_verify on;
      proxy_ssl_trusted_certificate %[9]s;
    }
  }
`, i, site.Backend, site.Address, listen, more, f.certificate, f.key, peers.ServerName, f.authority)
	}
	text.WriteString("}\n")
	path := filepath.Join(c.Dir, "nginx.conf")
	return process.Config{Args: []string{"-p", c.Dir + "/", "-c", path, "-e", "stderr"}}, os.WriteFile(path, []byte(text.String()), 0o600)
}
