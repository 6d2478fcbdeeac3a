package backend

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/process"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Answers that break HTTP, each to one request on a new connection.
func TestOddAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		reason string // "" means that the answer is good
		body   string
	}{
		"no HTTP":              {"SSH-2.0-x\r\n\r\n", ReasonProtocolError, ""},
		"bad status":           {"HTTP/1.1 abc\r\n\r\n", ReasonProtocolError, ""},
		"bad header":           {"HTTP/1.1 200 OK\r\nA B: c\r\n\r\n", ReasonProtocolError, ""},
		"two lengths":          {"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", ReasonProtocolError, ""},
		"broken off in header": {"HTTP/1.1 200 OK\r\nContent-", ReasonReset, ""},
		"broken off in body":   {"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", ReasonReset, "abc"},
		"broken off in chunk":  {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", ReasonReset, "abc"},
		"bad chunk":            {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n", ReasonReset, ""},
		"switched unasked":     {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", ReasonProtocolError, ""},
		"endless 1xx":          {strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 200), ReasonProtocolError, ""},
		"header over 1 MiB":    {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2<<20) + "\r\n\r\n", ReasonProtocolError, ""},
		"header of 100 KB":     {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 100_000) + "\r\nContent-Length: 2\r\n\r\nok", "", "ok"},
		"ended by close":       {"HTTP/1.0 200 OK\r\n\r\nall of it", "", "all of it"},
		"1xx and final in one": {"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "", "ok"},
		"more than announced":  {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n", "", "ok"},
	} {
		t.Run(name, func(t *testing.T) {
			raw := serveRaw(t, func(sc *serverConn) {
				if _, _, err := request(bufio.NewReader(sc)); err != nil {
					return
				}
				io.WriteString(sc, c.answer)
				sc.Conn.CloseWrite()
				io.Copy(io.Discard, sc)
			})
			x := newBench(t, []string{raw.addr})
			_, body, err := x.try(newRequest(t, "GET", "/", nil), nil)
			if string(body) != c.body {
				t.Errorf("body %q, want %q", body, c.body)
			}
			if c.reason == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantReason(t, err, c.reason, 502)
			if n := x.tally.get(func(y *tally) int { return y.errors[c.reason] }); n != 1 {
				t.Errorf("errors %v", x.tally.errors)
			}
		})
	}
}

// One byte at a time, with the context ending in the middle of the header.
func TestHeaderThatDrips(t *testing.T) {
	s := serveRaw(t, func(c *serverConn) {
		if _, _, err := request(bufio.NewReader(c)); err != nil {
			return
		}
		for _, b := range []byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") {
			if _, err := c.Write([]byte{b}); err != nil {
				return
			}
		}
		time.Sleep(50 * time.Millisecond)
		drainConn(c)
	})
	x := newBench(t, []string{s.addr})
	if got := x.get("/"); got != "ok" {
		t.Fatalf("%q", got)
	}
	stuck := serveRaw(t, func(c *serverConn) {
		if _, _, err := request(bufio.NewReader(c)); err != nil {
			return
		}
		io.WriteString(c, "HTTP/1.1 200 OK\r\nConte")
		drainConn(c)
	})
	x = newBench(t, []string{stuck.addr})
	call := newCall()
	call.ResponseHeaderTimeout = 30 * time.Millisecond
	_, _, err := x.try(newRequest(t, "GET", "/", nil), call)
	wantReason(t, err, ReasonTimeoutHeader, 504)
}

// The backend answers and resets while a large body is on its way.
func TestAnswerThenResetDuringUpload(t *testing.T) {
	s := serveRaw(t, func(c *serverConn) {
		br := bufio.NewReader(c)
		if _, err := http.ReadRequest(br); err != nil {
			return
		}
		io.WriteString(c, "HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
		time.Sleep(20 * time.Millisecond)
	})
	x := newBench(t, []string{s.addr})
	resp, body := x.do(newRequest(t, "POST", "/", io.NopCloser(io.LimitReader(endless{}, 50<<20))), nil)
	if resp.StatusCode != 413 || string(body) != "no" {
		t.Errorf("%s %q", resp.Status, body)
	}
}

func TestUploadThatFails(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, s *server) {
		gone := errors.New("the client went away")
		pr, pw := io.Pipe()
		go func() {
			pw.Write(pattern(100_000))
			pw.CloseWithError(gone)
		}()
		_, _, err := x.try(newRequest(t, "POST", "/echo", pr), nil)
		if err == nil || reasonOf(err) != "" && reasonOf(err) != ReasonReset {
			t.Errorf("got %v", err)
		}
		for _, length := range []int64{5, 200_000} {
			req := newRequest(t, "PUT", "/echo", io.NopCloser(bytes.NewReader(pattern(100_000))))
			req.ContentLength = length + 20_000 // short, by length
			if length == 5 {
				req.ContentLength = 99_999 // long
			}
			resp, _, err := x.try(req, nil)
			if err == nil && resp.StatusCode == 200 && length != 5 {
				t.Errorf("a body that is too short passed: %s", resp.Status)
			}
		}
		if got := x.get("/bytes/3"); got != string(pattern(3)) {
			t.Errorf("%q", got)
		}
	})
}

// The real thing: OpenSSL as the server, TLS 1.2 and 1.3.
func TestOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	for _, version := range []string{"-tls1_2", "-tls1_3"} {
		t.Run(version, func(t *testing.T) {
			addr := startOpenSSL(t, openssl, version)
			x := newBench(t, []string{addr}, retries(3), connections(func(c *resealv1.Connections) { c.CloseTimeout = dur(2 * time.Second) }))
			for range 5 {
				x.get("/page.txt")
			}
			x.stop()
			// s_server -WWW serves one request per connection.
			if x.tally.full != 1 || x.tally.resumed != 4 {
				t.Errorf("%d full, %d resumed", x.tally.full, x.tally.resumed)
			}
			if n := x.tally.kinds[notifyBoth]; n != 5 {
				t.Errorf("ends %v", x.tally.kinds)
			}
		})
	}
}

func startOpenSSL(t *testing.T, openssl, version string) string {
	t.Helper()
	dir := t.TempDir()
	cert := certificate(t, testName)
	key, err := marshalKey(cert)
	if err != nil {
		t.Fatal(err)
	}
	chain := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	for name, data := range map[string][]byte{"cert.pem": chain, "key.pem": key, "page.txt": []byte("hello")} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	addr, err := process.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(addr)
	cmd := exec.Command(openssl, "s_server", "-accept", port, "-cert", "cert.pem", "-key", "key.pem", "-WWW", "-quiet", version)
	cmd.Dir = dir
	var output bytes.Buffer
	cmd.Stderr = &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	eventually(t, "openssl listens", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return addr
}

func marshalKey(cert tls.Certificate) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
