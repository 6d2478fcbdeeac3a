package interop

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// programs has an edge between command-line clients and a server of both
// protocols.
type programs struct {
	*site
	upload string // a file with body
	body   []byte
}

// toServer is what the server does besides peers.Handler.
func toServer() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", peers.Handler(false))
	mux.HandleFunc("/refused", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "too much", http.StatusRequestEntityTooLarge)
	})
	mux.HandleFunc("/hesitant", func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(1500 * time.Millisecond) // longer than curl waits for 100 by itself
		_, _ = io.Copy(w, r.Body)
	})
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "file", time.Time{}, bytes.NewReader(peers.Body(peers.Large)))
	})
	mux.HandleFunc("/trailer", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, r.Trailer.Get("X-Sum"))
	})
	return mux
}

func TestPrograms(t *testing.T) {
	p := &programs{site: newSite(t, ""), body: peers.Body(peers.Large)[:2<<20]}
	p.upload = p.WriteFile("upload", string(p.body))
	backends := []*peers.Backend{p.Launch(t, goWith(toServer()), peers.Options{HTTP2: true})}
	p.pool("h1", backends, "  protocol: http1\n")
	p.pool("h2", backends, "  protocol: http2\n")
	// nghttp can't be told a name other than that of the URL.
	p.WaitAcked(p.Apply(harness.Route("bare", "web", "127.0.0.1", "h2", "")), p.edge)
	t.Run("curl", p.curl)
	t.Run("curl many", p.curlMany)
	t.Run("nghttp", p.nghttp)
	t.Run("h2load", p.h2load)
}

// run runs a client and returns what it printed, and how it ended.
func (p *programs) run(t *testing.T, program string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	path := harness.Need(t, program)
	ctx, cancel := context.WithDeadline(t.Context(), soon())
	defer cancel()
	command := exec.CommandContext(ctx, path, args...)
	var out, errs bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = bytes.NewReader(p.body), &out, &errs
	err = command.Run()
	return out.String(), errs.String(), err
}

func (p *programs) curl(t *testing.T) {
	ca := p.WriteFile("curl-ca.pem", string(p.Authority.PEM()))
	upload := string(p.body)
	// What curl says when it is done: the last status, how many bytes of a body it
	// sent, how many connections it made.
	const done = "%{stderr}\n%{http_code} sent %{size_upload} connects %{num_connects}"
	for _, test := range []struct {
		name, path string
		args       []string
		body, says string
	}{
		{"upload", peers.Echo, []string{"--data-binary", "@" + p.upload}, upload, "200 sent 2097152 connects 1"},
		{"upload of unknown length", peers.Echo, []string{"-X", "POST", "-T", "-"}, upload, "200 sent 209"}, // with HTTP/1.1's chunks
		{"refused while uploading", "/refused", []string{"-H", "Expect:", "--data-binary", "@" + p.upload}, "too much\n", "413 "},
		{"refused instead of 100", "/refused", []string{"-H", "Expect: 100-continue", "--expect100-timeout", "30", "--data-binary", "@" + p.upload}, "too much\n", "413 sent 0 "},
		{"waits for 100", "/hesitant", []string{"-H", "Expect: 100-continue", "--expect100-timeout", "30", "--data-binary", "@" + p.upload}, upload, "200 sent 2097152 "},
		{"does not wait for 100", "/hesitant", []string{"-H", "Expect: 100-continue", "--expect100-timeout", "0.1", "--data-binary", "@" + p.upload}, upload, "200 sent 2097152 "},
		{"head", peers.Large, []string{"-I", "-o", "/dev/null"}, "", "200 sent 0 "},
		{"range", "/file", []string{"-r", "1000-1999"}, upload[1000:2000], "206 sent 0 "},
		{"no content", peers.Status + "/204", nil, "", "204 sent 0 "},
	} {
		versions := []string{"--http1.1", "--http2"}
		if strings.Contains(test.name, "100") {
			versions = versions[:1] // in HTTP/2 curl 7.88 does not wait for 100
		}
		for _, version := range versions {
			for _, pool := range []string{"h1", "h2"} {
				t.Run(test.name+" "+version+" "+pool, func(t *testing.T) {
					if test.says == "413 sent 0 " && pool == "h2" {
						test.says = "413 " // HTTP/2 backends are not asked before
					}
					args := append([]string{"-sS", version, "--cacert", ca, "--connect-to", "::" + p.address, "-w", done}, test.args...)
					stdout, stderr, err := p.run(t, "curl", append(args, "https://"+host(pool)+test.path)...)
					if stdout != test.body || !strings.Contains(stderr, "\n"+test.says) || err != nil && test.path != "/refused" {
						t.Errorf("%d bytes, want %d; %v: %s, want %s", len(stdout), len(test.body), err, stderr, test.says)
					}
				})
			}
		}
	}
}

// curlMany gets a page many times at once.
func (p *programs) curlMany(t *testing.T) {
	ca := p.WriteFile("curl-ca.pem", string(p.Authority.PEM()))
	for _, version := range []string{"--http1.1", "--http2"} {
		for _, pool := range []string{"h1", "h2"} {
			stdout, stderr, err := p.run(t, "curl", "-sS", version, "--cacert", ca, "--connect-to", "::"+p.address, "--parallel", "--parallel-max", "20",
				"https://"+host(pool)+peers.Medium+"?[1-60]", "-o", filepath.Join(t.TempDir(), "page-#1"), "-w", "%{http_version} %{http_code} %{size_download}\n")
			want := map[string]string{"--http1.1": "1.1", "--http2": "2"}[version] + " 200 262144\n"
			if err != nil || strings.Count(stdout, want) != 60 {
				t.Errorf("%s to %s: %v, %s\n%s", version, pool, err, stderr, stdout)
			}
		}
	}
}

// nghttp speaks HTTP/2 in all its forms: padding, CONTINUATION, small windows,
// trailers, many streams with priorities.
func (p *programs) nghttp(t *testing.T) {
	base := "https://" + p.address
	for _, test := range []struct {
		name string
		args []string
		body string
	}{
		{"download", []string{base + peers.Large}, string(peers.Body(peers.Large))},
		{"small windows", []string{"-w", "10", "-W", "10", base + peers.Medium}, string(peers.Body(peers.Medium))},
		{"padding", []string{"-b", "200", "-d", p.upload, base + peers.Echo}, string(p.body)},
		{"continuation", []string{"--continuation", base + peers.Small}, string(peers.Body(peers.Small))},
		{"trailer", []string{"-d", p.upload, "--trailer", "x-sum: all of it", base + "/trailer"}, "all of it"},
		{"no content-length", []string{"--no-content-length", "-d", p.upload, base + peers.Echo}, string(p.body)},
		{"header table", []string{"-c", "0", base + peers.Small}, string(peers.Body(peers.Small))},
		{"many", []string{"-m", "40", "-p", "1", base + peers.Small, base + peers.Chunked}, strings.Repeat("x", 40*(1<<10+peers.ChunkedSize))},
		{"push off, expect", []string{"--expect-continue", "-d", p.upload, base + peers.Echo}, string(p.body)},
	} {
		t.Run(test.name, func(t *testing.T) {
			stdout, stderr, err := p.run(t, "nghttp", append([]string{"-y", "-t", "25"}, test.args...)...)
			if err != nil || stdout != test.body && (test.name != "many" || len(stdout) != len(test.body)) {
				t.Errorf("%d bytes, want %d; %v: %s", len(stdout), len(test.body), err, stderr)
			}
		})
	}
}

var h2loadDone = regexp.MustCompile(`requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored`)

// h2load sends much at once, of both protocols.
func (p *programs) h2load(t *testing.T) {
	for _, test := range []struct {
		name     string
		requests int
		args     []string
		path     string
	}{
		{"HTTP 1.1", 1000, []string{"--h1", "-c", "16"}, peers.Small},
		{"HTTP 1.1 pipelined", 400, []string{"--h1", "-c", "4", "-m", "8"}, peers.Small},
		{"HTTP 1.1 uploads", 96, []string{"--h1", "-c", "16", "-d", "UPLOAD"}, peers.Echo},
		{"HTTP 2", 2000, []string{"-c", "4", "-m", "100"}, peers.Small},
		{"HTTP 2 uploads", 80, []string{"-c", "4", "-m", "20", "-d", "UPLOAD"}, peers.Echo},
		{"HTTP 2 small windows", 60, []string{"-c", "4", "-m", "50", "-w", "12", "-W", "16"}, peers.Medium},
		{"HTTP 2 short connections", 400, []string{"-c", "100", "-m", "4"}, peers.Small},
	} {
		for _, pool := range []string{"h1", "h2"} {
			t.Run(test.name+" "+pool, func(t *testing.T) {
				upload := filepath.Join(t.TempDir(), "upload")
				if err := os.WriteFile(upload, peers.Body(peers.Medium)[:100_000], 0o600); err != nil {
					t.Fatal(err)
				}
				var args []string
				for _, arg := range test.args {
					args = append(args, strings.ReplaceAll(arg, "UPLOAD", upload))
				}
				args = append(args, "-n", strconv.Itoa(test.requests), "--connect-to="+p.address, fmt.Sprintf("https://%s:%s%s", host(pool), port(t, p.address), test.path))
				stdout, stderr, err := p.run(t, "h2load", args...)
				match := h2loadDone.FindStringSubmatch(stdout)
				if err != nil || match == nil || match[3] != strconv.Itoa(test.requests) || match[4] != "0" || match[5] != "0" {
					t.Errorf("not all of %d requests succeeded: %v\n%s%s", test.requests, err, stdout, stderr)
				}
			})
		}
	}
}
