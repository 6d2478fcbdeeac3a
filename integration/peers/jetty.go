package peers

import (
	"context"
	_ "embed" // the source of the Jetty server
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
)

var (
	//go:embed jetty/Backend.java
	jettyBackend []byte
	//go:embed jetty/Handshake.java
	jettyHandshake []byte
)

// jettyProgram needs Debian's libjetty9-java and libservlet-api-java.
var jettyProgram = javaProgram{
	name: "jetty", main: "Backend",
	sources: map[string][]byte{"Backend.java": jettyBackend, "Handshake.java": jettyHandshake, "Pem.java": javaPem},
	jars: []string{
		"jetty9-server", "jetty9-io", "jetty9-util", "jetty9-http", "jetty9-alpn-server", "jetty9-alpn-java-server",
		"jetty9-http2-server", "jetty9-http2-common", "jetty9-http2-hpack", "servlet-api",
	},
	install: "apt-get install libjetty9-java openjdk-17-jdk-headless, or run integration/setup.sh",
}

// Jetty starts Jetty 9 as people run it, with an SslContextFactory of its own
// and, in mode TLS12Tickets and TLS13, nothing of Java's switched. Its
// certificate has two names, so it chooses certificates by SNI and remembers the
// choice in the session. JSSE then makes no stateless sessions: in TLS 1.2 it
// answers a session_ticket extension with an empty ticket and resumes by session
// ID only clients that don't send one; in TLS 1.3 it gives a ticket per handshake
// that is good once.
func Jetty(ctx context.Context, o Options) (*Backend, error) {
	return startJetty(ctx, o, "own", javaTickets(o)...)
}

// JettyOneName is Jetty with one name in its certificate, which needs no choice:
// JSSE makes stateless tickets.
func JettyOneName(ctx context.Context, o Options) (*Backend, error) {
	o.OneName = true
	return Jetty(ctx, o)
}

// JettyWildcard is Jetty with one name and a wildcard in its certificate. It
// chooses as with two names.
func JettyWildcard(ctx context.Context, o Options) (*Backend, error) {
	o.OneName = true
	o.Names = append([]string{"*." + ServerName}, o.Names...)
	return Jetty(ctx, o)
}

// JettyArranged is Jetty with JSSE's key manager in place of its own, so that
// it does not choose certificates by SNI and sessions are stateless in spite of
// several names.
func JettyArranged(ctx context.Context, o Options) (*Backend, error) {
	return startJetty(ctx, o, "plain", javaTickets(o)...)
}

// javaTickets are the arguments of Java for a mode of resumption. By default JSSE
// makes tickets.
func javaTickets(o Options) []string {
	if o.Mode == TLS12SessionIDs || o.Stateful {
		return []string{"-Djdk.tls.server.enableSessionTicketExtension=false"}
	}
	return nil
}

func startJetty(ctx context.Context, o Options, keys string, java ...string) (*Backend, error) {
	if o.NoSessions {
		return nil, fmt.Errorf("jetty: without sessions: %w", ErrMode)
	}
	pair, err := o.issue()
	if err != nil {
		return nil, err
	}
	certificate, key, _, err := pair.Write(o.Dir, "jetty")
	if err != nil {
		return nil, err
	}
	port := "0"
	if o.Address != "" {
		if _, port, err = net.SplitHostPort(o.Address); err != nil {
			return nil, fmt.Errorf("jetty: %w", err)
		}
	}
	var ready atomic.Pointer[[2]string]
	running, err := jettyProgram.start(ctx, o, java, func(line string) bool {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "READY" {
			ready.Store(&[2]string{fields[1], fields[2]})
		}
		return true
	},
		certificate, key, pick(o.AnyVersion && o.Mode == TLS13, "any", protocolName(o.Mode)), keys,
		pick(o.CloseEach, "close", "keep"), pick(o.HTTP2, "h2", "h1"), pick(o.Strict, "strict", "lenient"), port)
	if err != nil {
		return nil, fmt.Errorf("jetty: %w", err)
	}
	if err := started(running, running.WaitReady(ctx, func(context.Context) error {
		if ready.Load() == nil {
			return errors.New("no READY line yet")
		}
		return nil
	})); err != nil {
		return nil, err
	}
	ports := ready.Load()
	admin := newAdmin("http://127.0.0.1:" + ports[1])
	name := "jetty-" + o.Mode.String()
	if o.HTTP2 {
		name = "jetty-h2-" + o.Mode.String()
	}
	paths := all()
	paths[Endless] = true
	return &Backend{
		Name: name, Address: "127.0.0.1:" + ports[0], Mode: o.Mode, paths: paths, output: running.Output, running: running,
		counts: func(ctx context.Context) (Counts, error) {
			var counts Counts
			if err := admin.get(ctx, &counts); err != nil {
				return Counts{}, fmt.Errorf("jetty: counts: %w", err)
			}
			return counts, nil
		},
		stop: func() error {
			admin.client.CloseIdleConnections()
			return running.Stop()
		},
	}, nil
}

// admin reads JSON from a backend's plain port.
type admin struct {
	url    string
	client *http.Client
}

func newAdmin(url string) *admin {
	return &admin{url: url, client: &http.Client{Transport: &http.Transport{}}}
}

func (a *admin) get(ctx context.Context, into any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url, nil)
	if err != nil {
		return err
	}
	response, err := a.client.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", a.url, response.Status)
	}
	return json.NewDecoder(response.Body).Decode(into)
}
