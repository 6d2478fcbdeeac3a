package harness

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/process"
)

// Failures collects the errors of concurrent requests: all are counted, the
// first ones are kept.
type Failures struct {
	count atomic.Int64
	mu    sync.Mutex
	kept  []string
}

// Add takes an error, or nil.
func (f *Failures) Add(err error) {
	if err == nil {
		return
	}
	f.count.Add(1)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.kept) < 10 {
		f.kept = append(f.kept, time.Now().Format("15:04:05.000 ")+err.Error())
	}
}

// Check fails tb when there was an error in that many requests.
func (f *Failures) Check(tb testing.TB, requests int64) {
	tb.Helper()
	if n := f.count.Load(); n > 0 {
		tb.Errorf("%d of %d requests failed; the first ones:\n%s", n, requests, strings.Join(f.kept, "\n"))
	}
}

// Get makes one request and checks its status and body.
func Get(ctx context.Context, client *http.Client, url string, want []byte) error {
	return Exchange(ctx, client, http.MethodGet, url, nil, want)
}

// Exchange is Get with a method and a body.
func Exchange(ctx context.Context, client *http.Client, method, url string, body io.Reader, want []byte) error {
	request, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	got, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return fmt.Errorf("%s %s: after %d bytes: %w", method, url, len(got), err)
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("%s %s: %s: %.200q", method, url, response.Status, got)
	case !bytes.Equal(got, want):
		return fmt.Errorf("%s %s: %d bytes, not the %d that were expected", method, url, len(got), len(want))
	}
	return nil
}

// Hammer makes n requests with 32 workers.
func Hammer(ctx context.Context, n int, request func(ctx context.Context, i int) error) *Failures {
	var failed Failures
	var next atomic.Int64
	var workers sync.WaitGroup
	for range 32 {
		workers.Go(func() {
			for i := next.Add(1); i <= int64(n) && ctx.Err() == nil; i = next.Add(1) {
				failed.Add(request(ctx, int(i)))
			}
		})
	}
	workers.Wait()
	if ctx.Err() != nil {
		failed.Add(ctx.Err())
	}
	return &failed
}

// Settle calls check until it returns nil, for at most 10 s.
func Settle(tb testing.TB, check func() error) {
	tb.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			tb.Error(err)
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// Need is the path of a program, or skips the test.
func Need(tb testing.TB, program string) string {
	tb.Helper()
	path, err := process.Find(program, "")
	if err != nil {
		tb.Skip(err)
	}
	return path
}

// Run runs a client and returns its standard output.
func Run(t *testing.T, input io.Reader, program string, args ...string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	command := exec.CommandContext(ctx, program, args...)
	var stderr bytes.Buffer
	command.Stdin, command.Stderr = input, &stderr
	output, err := command.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s\n%s", filepath.Base(program), strings.Join(args, " "), err, stderr.Bytes(), output)
	}
	return output
}
