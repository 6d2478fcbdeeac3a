package peers

import (
	"context"
	_ "embed" // the sources of the Java servers
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/reseal/reseal/integration/process"
)

// Stock is a server whose resumption is as its makers left it. It answers every
// GET with 200.
type Stock struct {
	// Name of the server.
	Name string
	// Start starts it. Of the options it heeds Authority, Dir, OneName, Names and
	// JavaHome; Mode TLS12Tickets leaves it TLS 1.2 alone, and TLS13 all versions
	// that it has by default.
	Start func(context.Context, Options) (*Backend, error)
	// Java says that it runs on Options.JavaHome.
	Java bool
}

// Stocks are all stock servers.
func Stocks() []Stock {
	return []Stock{
		{"jetty", stockJetty, true},
		{"tomcat", tomcat.stock, true},
		{"netty", netty.stock, true},
		{"httpserver", httpServer.stock, true},
		{"nginx", stockNginx, false},
		{"apache", stockApache, false},
		{"haproxy", stockHAProxy, false},
		{"openssl", stockOpenSSL, false},
		{"gnutls", stockGnuTLS, false},
		{"go", Go, false},
	}
}

func stockJetty(ctx context.Context, o Options) (*Backend, error) {
	o.AnyVersion = true
	return Jetty(ctx, o)
}

var (
	//go:embed java/TomcatServer.java
	tomcatSource []byte
	//go:embed java/NettyServer.java
	nettySource []byte
	//go:embed java/PlainServer.java
	plainSource []byte
)

var (
	tomcat = javaProgram{
		name: "tomcat", main: "TomcatServer",
		sources: map[string][]byte{"TomcatServer.java": tomcatSource, "Pem.java": javaPem},
		jars: []string{
			"tomcat9-catalina", "tomcat9-coyote", "tomcat9-util", "tomcat9-util-scan", "tomcat9-juli", "tomcat9-api",
			"tomcat9-jni", "tomcat9-servlet-api", "tomcat9-annotations-api", "tomcat9-jaspic-api", "tomcat9-el-api", "tomcat9-jsp-api",
		},
		install: "apt-get install libtomcat9-java, or run integration/setup.sh",
	}
	netty = javaProgram{
		name: "netty", main: "NettyServer",
		sources: map[string][]byte{"NettyServer.java": nettySource, "Pem.java": javaPem},
		jars: []string{
			"netty-common", "netty-buffer", "netty-resolver", "netty-transport", "netty-handler", "netty-codec", "netty-codec-http",
			"netty-transport-native-unix-common",
		},
		install: "apt-get install libnetty-java, or run integration/setup.sh",
	}
	httpServer = javaProgram{
		name: "httpserver", main: "PlainServer",
		sources: map[string][]byte{"PlainServer.java": plainSource, "Pem.java": javaPem},
		install: jettyProgram.install,
	}
)

// stock starts a Java server that prints READY, behind a tap.
func (p javaProgram) stock(ctx context.Context, o Options) (*Backend, error) {
	var ready atomic.Bool
	return o.stock(ctx, p.name, func(f files, address string) (*process.Process, error) {
		_, port, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		return p.start(ctx, o, nil, func(line string) bool {
			if line == "READY" {
				ready.Store(true)
			}
			return true
		}, f.certificate, f.key, pick(o.Mode == TLS13, "any", "TLSv1.2"), port, o.Dir)
	}, func(context.Context, string) error {
		if !ready.Load() {
			return errors.New("no READY line yet")
		}
		return nil
	})
}

// files hold a server's certificate and key.
type files struct{ certificate, key, both string }

// stock starts a server that listens on a free address, behind a tap. Ready may
// be nil: it then is ready when it listens.
func (o Options) stock(ctx context.Context, name string, start func(f files, address string) (*process.Process, error), ready func(context.Context, string) error) (*Backend, error) {
	pair, err := o.issue()
	if err != nil {
		return nil, err
	}
	var f files
	if f.certificate, f.key, f.both, err = pair.Write(o.Dir, name); err != nil {
		return nil, err
	}
	address, err := process.FreeAddress()
	if err != nil {
		return nil, err
	}
	running, err := start(f, address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if ready == nil {
		ready = func(_ context.Context, address string) error { return process.Listening(address) }
	}
	if err := started(running, running.WaitReady(ctx, func(ctx context.Context) error { return ready(ctx, address) })); err != nil {
		return nil, err
	}
	return before(&Backend{
		Name: name + "-" + o.Mode.String(), Address: address, Mode: o.Mode, paths: has(),
		output: running.Output, stop: running.Stop, running: running,
	})
}

func stockNginx(ctx context.Context, o Options) (*Backend, error) {
	return o.stock(ctx, "nginx", func(f files, address string) (*process.Process, error) {
		user := ""
		if os.Getuid() == 0 {
			user = "user root;" // a worker could not read the folder
		}
		config, err := writeFile(o.Dir, "nginx.conf", fmt.Appendf(nil, `%s
daemon off;
pid nginx.pid;
events {}
http {
  access_log off;
  client_body_temp_path tmp-body; proxy_temp_path tmp-proxy; fastcgi_temp_path tmp-fastcgi;
  uwsgi_temp_path tmp-uwsgi; scgi_temp_path tmp-scgi;
  server {
    listen %s ssl;
    ssl_certificate %s; ssl_certificate_key %s;
    %s
    return 200 "hello\n";
  }
}
`, user, address, f.certificate, f.key, pick(o.Mode == TLS13, "ssl_protocols TLSv1.2 TLSv1.3;", "ssl_protocols TLSv1.2;")))
		if err != nil {
			return nil, err
		}
		return process.Start(process.Config{Path: "nginx", Args: []string{"-p", o.Dir + "/", "-c", config, "-e", "stderr"}})
	}, nil)
}

func stockHAProxy(ctx context.Context, o Options) (*Backend, error) {
	return o.stock(ctx, "haproxy", func(f files, address string) (*process.Process, error) {
		config, err := writeFile(o.Dir, "haproxy.cfg", fmt.Appendf(nil, `defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend tls
  bind %s ssl crt %s%s
  http-request return status 200 content-type text/plain string "hello"
`, address, f.both, pick(o.Mode == TLS13, "", " ssl-max-ver TLSv1.2")))
		if err != nil {
			return nil, err
		}
		return process.Start(process.Config{Path: "haproxy", Args: []string{"-db", "-f", config}})
	}, nil)
}

// stockApache loads what an HTTPS server needs and configures no more.
func stockApache(ctx context.Context, o Options) (*Backend, error) {
	return o.stock(ctx, "apache", func(f files, address string) (*process.Process, error) {
		if _, err := writeFile(o.Dir, filepath.Join("www", "1k"), Body(Small)); err != nil {
			return nil, err
		}
		modules := ""
		for _, module := range []string{"mpm_event", "authz_core", "ssl"} {
			modules += fmt.Sprintf("LoadModule %s_module /usr/lib/apache2/modules/mod_%s.so\n", module, module)
		}
		config, err := writeFile(o.Dir, "apache.conf", fmt.Appendf(nil, `%sServerRoot %s
DefaultRuntimeDir %s
PidFile apache.pid
ServerName %s
Listen %s https
ErrorLog /dev/stderr
DocumentRoot %s/www
SSLEngine on
SSLCertificateFile %s
SSLCertificateKeyFile %s
%s
`, modules, o.Dir, o.Dir, ServerName, address, o.Dir, f.certificate, f.key, pick(o.Mode == TLS13, "", "SSLProtocol TLSv1.2")))
		if err != nil {
			return nil, err
		}
		return process.Start(process.Config{Path: "apache2", Args: []string{"-DFOREGROUND", "-f", config}})
	}, nil)
}

func stockOpenSSL(ctx context.Context, o Options) (*Backend, error) {
	var ready atomic.Bool
	return o.stock(ctx, "openssl", func(f files, address string) (*process.Process, error) {
		www := filepath.Join(o.Dir, "www")
		if _, err := writeFile(www, "1k", Body(Small)); err != nil {
			return nil, err
		}
		args := []string{"s_server", "-accept", address, "-cert", f.certificate, "-key", f.key, "-WWW"}
		if o.Mode != TLS13 {
			args = append(args, "-tls1_2")
		}
		return process.Start(process.Config{Name: "s_server", Path: "openssl", Args: args, Dir: www, OnLine: func(line string) bool {
			if strings.HasPrefix(line, "ACCEPT") {
				ready.Store(true)
			}
			return true
		}})
	}, func(context.Context, string) error {
		// It serves one connection at a time, so none is made to look.
		if !ready.Load() {
			return errors.New("no ACCEPT line yet")
		}
		return nil
	})
}

// stockGnuTLS listens on all addresses: gnutls-serv can't do otherwise.
func stockGnuTLS(ctx context.Context, o Options) (*Backend, error) {
	return o.stock(ctx, "gnutls", func(f files, address string) (*process.Process, error) {
		_, port, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		args := []string{"--http", "--port", port, "--x509certfile", f.certificate, "--x509keyfile", f.key}
		if o.Mode != TLS13 {
			args = append(args, "--priority", "NORMAL:-VERS-ALL:+VERS-TLS1.2")
		}
		return process.Start(process.Config{Name: "gnutls-serv", Path: "gnutls-serv", Install: "apt-get install gnutls-bin, or run integration/setup.sh", Args: args})
	}, nil)
}
