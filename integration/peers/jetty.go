package peers

import (
	"context"
	"crypto/sha256"
	_ "embed" // the source of the Jetty server
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/reseal/reseal/integration/process"
)

//go:embed jetty/Backend.java
var jettySource []byte

// jettyJars are in Debian's libjetty9-java and libservlet-api-java.
var jettyJars = []string{
	"jetty9-server", "jetty9-io", "jetty9-util", "jetty9-http", "jetty9-alpn-server", "jetty9-alpn-java-server",
	"jetty9-http2-server", "jetty9-http2-common", "jetty9-http2-hpack", "servlet-api",
}

const jettyInstall = "apt-get install libjetty9-java openjdk-17-jdk-headless, or run integration/setup.sh"

// Jetty starts Jetty 9 on the installed Java. A handshake counts as full when
// JSSE asked for the certificate during it.
func Jetty(ctx context.Context, o Options) (*Backend, error) {
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
	classPath, err := jettyClasses(ctx, o.Dir)
	if err != nil {
		return nil, fmt.Errorf("jetty: %w", err)
	}
	var ready atomic.Pointer[[2]string]
	java, err := process.Start(process.Config{
		Name: "jetty", Path: "java", Install: jettyInstall,
		Args: []string{
			"-Xmx512m", "-XX:+UseSerialGC", pick(o.Bulk, "-XX:+TieredCompilation", "-XX:TieredStopAtLevel=1"), "-XX:-UsePerfData",
			"-Djava.io.tmpdir=" + o.Dir,
			fmt.Sprintf("-Djdk.tls.server.enableSessionTicketExtension=%t", o.Mode != TLS12SessionIDs && !o.Stateful),
			"-cp", classPath, "Backend", certificate, key, protocolName(o.Mode),
			pick(o.CloseEach, "close", "keep"), pick(o.HTTP2, "h2", "h1"), pick(o.Strict, "strict", "lenient"), port,
		},
		OnLine: func(line string) bool {
			if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "READY" {
				ready.Store(&[2]string{fields[1], fields[2]})
			}
			return true
		},
	})
	if err != nil {
		return nil, err
	}
	if err := started(java, java.WaitReady(ctx, func(context.Context) error {
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
		Name: name, Address: "127.0.0.1:" + ports[0], Mode: o.Mode, paths: paths, output: java.Output, running: java,
		counts: func(ctx context.Context) (Counts, error) {
			var answer struct {
				Counts
				Resumed int64 `json:"resumed"`
			}
			if err := admin.get(ctx, &answer); err != nil {
				return Counts{}, fmt.Errorf("jetty: counts: %w", err)
			}
			answer.setResumed(o.Mode, answer.Resumed)
			return answer.Counts, nil
		},
		stop: func() error {
			admin.client.CloseIdleConnections()
			return java.Stop()
		},
	}, nil
}

// jettyClasses compiles the server once per version of its source and returns
// the class path.
func jettyClasses(ctx context.Context, fallback string) (string, error) {
	javac, err := process.Find("javac", jettyInstall)
	if err != nil {
		return "", err
	}
	var jars []string
	for _, name := range jettyJars {
		jar := "/usr/share/java/" + name + ".jar"
		if _, err := os.Stat(jar); err != nil {
			return "", fmt.Errorf("%s: %w: %s", jar, process.ErrMissing, jettyInstall)
		}
		jars = append(jars, jar)
	}
	path := strings.Join(jars, ":")
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = fallback
	}
	hash := sha256.Sum256(append(jettySource, path...))
	classes := filepath.Join(cache, "reseal-integration", fmt.Sprintf("jetty-%x", hash[:8]))
	if _, err := os.Stat(classes); err == nil {
		return classes + ":" + path, nil
	}
	if err := os.MkdirAll(filepath.Dir(classes), 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(filepath.Dir(classes), "javac-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(work) }()
	source, err := writeFile(work, "Backend.java", jettySource)
	if err != nil {
		return "", err
	}
	output := filepath.Join(work, "classes")
	command := exec.CommandContext(ctx, javac, "-cp", path, "-d", output, source)
	if text, err := command.CombinedOutput(); err != nil {
		return "", fmt.Errorf("javac: %w\n%s", err, text)
	}
	// Another test may have been faster; its result is as good.
	if err := os.Rename(output, classes); err != nil {
		if _, missing := os.Stat(classes); missing != nil {
			return "", err
		}
	}
	return classes + ":" + path, nil
}

func protocolName(mode Mode) string { return pick(mode == TLS13, "TLSv1.3", "TLSv1.2") }

func pick(condition bool, yes, no string) string {
	if condition {
		return yes
	}
	return no
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
