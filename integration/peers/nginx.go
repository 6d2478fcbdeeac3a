package peers

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/reseal/reseal/integration/process"
)

// nginxStatuses are the codes that nginx serves below Status.
var nginxStatuses = []int{200, 204, 400, 404, 500, 502, 503, 504}

// Nginx starts nginx with one worker. Handshakes are counted from its debug
// log, which also tells of connections without a request.
func Nginx(ctx context.Context, o Options) (*Backend, error) {
	pair, err := o.issue()
	if err != nil {
		return nil, err
	}
	if _, _, _, err := pair.Write(o.Dir, "nginx"); err != nil {
		return nil, err
	}
	for _, path := range []string{Empty, Small, Large, Chunked, Trailers, Slow} {
		if _, err := writeFile(o.Dir, filepath.Join("www", path), Body(path)); err != nil {
			return nil, err
		}
	}
	address, err := o.listenAddress()
	if err != nil {
		return nil, err
	}
	probe, err := process.FreeAddress()
	if err != nil {
		return nil, err
	}
	config, err := writeFile(o.Dir, "nginx.conf", []byte(nginxConfig(o, address, probe)))
	if err != nil {
		return nil, err
	}
	counter := &nginxCounter{}
	nginx, err := process.Start(process.Config{
		Path: "nginx", Args: []string{"-p", o.Dir + "/", "-c", config, "-e", "stderr"}, OnLine: counter.line,
	})
	if err != nil {
		return nil, err
	}
	if err := started(nginx, nginx.WaitReady(ctx, func(context.Context) error { return process.Listening(probe) })); err != nil {
		return nil, err
	}
	name := "nginx-" + o.Mode.String()
	if o.HTTP2 {
		name = "nginx-h2-" + o.Mode.String()
	}
	return &Backend{
		Name: name, Address: address, Mode: o.Mode, output: nginx.Output, stop: nginx.Stop, running: nginx,
		paths:  has(Empty, Small, Large, Chunked, Trailers, NotModified, Early, Slow, Status),
		counts: func(context.Context) (Counts, error) { return counter.counts(o.Mode), nil },
	}, nil
}

func nginxConfig(o Options, address, probe string) string {
	var statuses strings.Builder
	for _, code := range nginxStatuses {
		fmt.Fprintf(&statuses, "    location = %s/%d { return %d; }\n", Status, code, code)
	}
	tickets, cache := "off", "shared:backend:4m"
	switch {
	case o.NoSessions:
		cache = "off"
	case o.Mode != TLS12SessionIDs:
		tickets = "on"
	}
	lifetime := time.Hour
	if o.SessionTimeout > 0 {
		lifetime = o.SessionTimeout
	}
	keepalive := "keepalive_timeout 120s; keepalive_requests 1000000;"
	if o.CloseEach {
		keepalive = "keepalive_timeout 0;"
	}
	// Workers of a root master would become nobody, who can't read o.Dir.
	user := ""
	if os.Getuid() == 0 {
		user = "user root;"
	}
	return user + fmt.Sprintf(`daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr debug_event;
events { worker_connections 4096; }
http {
  access_log off;
  client_body_temp_path tmp-body; proxy_temp_path tmp-proxy; fastcgi_temp_path tmp-fastcgi;
  uwsgi_temp_path tmp-uwsgi; scgi_temp_path tmp-scgi;
  default_type text/plain;
  etag off; if_modified_since off;
  %[1]s
  # Only says that nginx is up.
  server { listen %[2]s; return 204; }
  server {
    listen %[3]s ssl%[4]s backlog=1024;
    ssl_certificate nginx.crt; ssl_certificate_key nginx.key;
    ssl_protocols %[5]s;
    ssl_session_tickets %[6]s;
    ssl_session_cache %[16]s; ssl_session_timeout %[17]ds;
    client_max_body_size 0;
    root www;
    location = %[7]s { return 304; }
    location = %[8]s { return 200 "%[9]s"; }
    # Server-side includes take Content-Length away.
    location = %[10]s { ssi on; ssi_types *; }
    location = %[11]s { ssi on; ssi_types *; add_trailer %[12]s %[13]s; }
    location = %[14]s { limit_rate 4k; }
%[15]s  }
}
`, keepalive, probe, address, pick(o.HTTP2, " http2", ""), protocolName(o.Mode), tickets,
		NotModified, Early, strings.ReplaceAll(EarlyBody, "\n", `\n`),
		Chunked, Trailers, TrailerName, TrailerValue, Slow, statuses.String(), cache, lifetime/time.Second)
}

// nginxCounter counts what nginx logs.
type nginxCounter struct {
	mu    sync.Mutex
	total Counts
	// all handshakes, resumed ones included.
	handshakes, resumed int64
}

// line takes one line of the log. Lines below "info" are only counted.
func (n *nginxCounter) line(line string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case strings.Contains(line, " SSL: TLSv1"):
		n.handshakes++
	case strings.HasSuffix(line, " SSL reused session"):
		n.resumed++
	case strings.Contains(line, " SSL_do_handshake() failed"), strings.Contains(line, " while SSL handshaking"):
		n.total.Failed++
	case strings.Contains(line, "(104: Connection reset by peer)"):
		n.total.Resets++
	}
	return !strings.Contains(line, " [debug] ")
}

func (n *nginxCounter) counts(mode Mode) Counts {
	n.mu.Lock()
	defer n.mu.Unlock()
	counts := n.total
	counts.Full = n.handshakes - n.resumed
	counts.setResumed(mode, n.resumed)
	counts.Connections, counts.Requests, counts.Unclean = Unknown, Unknown, Unknown
	return counts
}
