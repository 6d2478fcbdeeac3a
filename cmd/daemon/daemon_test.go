package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newTestFlags(out io.Writer) (*Flags, *string, *map[string]string) {
	flags := NewFlags("reseal-edge", "Summary.", out)
	listen := flags.String("listen", ":7443", "`ADDRESS`")
	labels := flags.StringToString("state-labels", nil, "`k=v`")
	return flags, listen, labels
}

func TestFlagSources(t *testing.T) {
	file := filepath.Join(t.TempDir(), "edge.yaml")
	if err := os.WriteFile(file, []byte("listen: :1\nstate-labels: {zone: x}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("RESEAL_EDGE_CONFIG", file)

	flags, listen, labels := newTestFlags(io.Discard)
	if done, _ := flags.Parse(nil, "v"); done || *listen != ":1" || (*labels)["zone"] != "x" {
		t.Errorf("file: listen %q, labels %v", *listen, *labels)
	}
	t.Setenv("RESEAL_EDGE_LISTEN", ":2")
	flags, listen, _ = newTestFlags(io.Discard)
	if done, _ := flags.Parse(nil, "v"); done || *listen != ":2" {
		t.Errorf("the environment did not win over the file: listen %q", *listen)
	}
	flags, listen, _ = newTestFlags(io.Discard)
	if done, _ := flags.Parse([]string{"--listen=:3"}, "v"); done || *listen != ":3" {
		t.Errorf("the command line did not win: listen %q", *listen)
	}
}

func TestFlagErrors(t *testing.T) {
	dir := t.TempDir()
	unknown := filepath.Join(dir, "unknown.yaml")
	if err := os.WriteFile(unknown, []byte("lisen: :1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--nope"}, ExitUsage, "unknown flag: --nope"},
		{[]string{"stray"}, ExitUsage, `unexpected argument "stray"`},
		{[]string{"--config", filepath.Join(dir, "absent")}, ExitUsage, "no such file"},
		{[]string{"--config", unknown}, ExitUsage, `there is no flag "lisen"`},
		{[]string{"--help"}, ExitOK, "RESEAL_EDGE_LISTEN"},
		{[]string{"--version"}, ExitOK, "reseal-edge v1"},
	} {
		var out strings.Builder
		flags, _, _ := newTestFlags(&out)
		done, code := flags.Parse(test.args, "v1")
		if !done || code != test.code || !strings.Contains(out.String(), test.says) {
			t.Errorf("%v: done %v, code %d, output %q", test.args, done, code, out.String())
		}
	}
}

func TestPageRefusesPlainBeyondLoopback(t *testing.T) {
	page := Page{Flag: "admin", Address: "0.0.0.0:0", Handler: http.NotFoundHandler(), Logger: slog.New(slog.DiscardHandler)}
	if _, err := page.Listen(); err == nil || !strings.Contains(err.Error(), "--insecure-admin") {
		t.Fatalf("error %v", err)
	}
	all := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	page = Page{Flag: "admin", Address: "0.0.0.0:0", Insecure: true, Handler: all, Logger: page.Logger}
	listener, err := page.Listen()
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/metrics": 200, "/debug/pprof/": 404} {
		recorder := httptest.NewRecorder()
		page.Handler.ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, path, nil))
		if recorder.Code != want {
			t.Errorf("%s: %d, want %d", path, recorder.Code, want)
		}
	}
}

func TestPageServesUntilTheEnd(t *testing.T) {
	page := Page{Flag: "http", Address: "127.0.0.1:0", Handler: http.NotFoundHandler(), Logger: slog.New(slog.DiscardHandler)}
	listener, err := page.Listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- page.Serve(ctx, listener) }()
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: transport}).Get("http://" + listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	cancel()
	if err := <-served; err != nil {
		t.Fatal(err)
	}
}

// TestPageIsBounded: further connections wait until one ends.
func TestPageIsBounded(t *testing.T) {
	const more = 10
	entered, release := make(chan struct{}, maxConnections+more), make(chan struct{})
	page := Page{Flag: "http", Address: "127.0.0.1:0", Logger: slog.New(slog.DiscardHandler), Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		entered <- struct{}{}
		<-release
	})}
	listener, err := page.Listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := page.Serve(ctx, listener); err != nil {
			t.Error(err)
		}
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	var asking sync.WaitGroup
	for range maxConnections + more {
		asking.Go(func() {
			resp, err := client.Get("http://" + listener.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
		})
	}
	for range maxConnections {
		<-entered
	}
	select {
	case <-entered:
		t.Error("one more is served")
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	asking.Wait()
	cancel()
	running.Wait()
}

func TestRunExitCodes(t *testing.T) {
	logger := slog.New(slog.DiscardHandler)
	ok := func(ctx context.Context) error { <-ctx.Done(); return nil }
	if code := Run(context.Background(), logger, ok, func(context.Context) error { return errors.New("boom") }); code != ExitFailure {
		t.Errorf("a failure ends with %d", code)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if code := Run(ctx, logger, ok, func(ctx context.Context) error { return ctx.Err() }); code != ExitOK {
		t.Errorf("a signal ends with %d", code)
	}
}

// TestReloadSignals: SIGHUP and SIGUSR1 call reload, and never end the process.
func TestReloadSignals(t *testing.T) {
	calls := make(chan struct{}, 1)
	reload := OnReload(slog.New(slog.DiscardHandler), func() { calls <- struct{}{} })
	// Before Run: it must not end us, and is not lost.
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan int)
	go func() { done <- Run(ctx, slog.New(slog.DiscardHandler), reload) }()
	for _, signal := range []syscall.Signal{0, syscall.SIGUSR1, syscall.SIGHUP} {
		if err := syscall.Kill(os.Getpid(), signal); err != nil {
			t.Fatal(err)
		}
		select {
		case <-calls:
		case <-time.After(10 * time.Second):
			t.Fatalf("no reload after %v", signal)
		}
	}
	cancel()
	if code := <-done; code != ExitOK {
		t.Errorf("exit code %d", code)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil { // during the drain
		t.Fatal(err)
	}
}
