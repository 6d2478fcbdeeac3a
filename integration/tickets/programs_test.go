package tickets

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// sClient is openssl s_client, one process for each connection, with its session
// in a file.
type sClient struct {
	path, version string // as in -tls1_3
	roots, dir    string
	counts        *counts
}

// visit makes one connection and request. One that breaks is counted and is not
// an error.
func (s *sClient) visit(ctx context.Context, address string) error {
	session, next := filepath.Join(s.dir, "session"), filepath.Join(s.dir, "next")
	args := []string{
		"s_client", "-connect", address, "-servername", harness.SiteName, "-CAfile", s.roots, "-verify_return_error",
		s.version, "-ign_eof", "-sess_out", next,
	}
	_ = os.Remove(next)
	_, err := os.Stat(session)
	offered := err == nil
	if offered {
		args = append(args, "-sess_in", session)
	}
	ctx, cancel := context.WithTimeout(ctx, visitTimeout)
	defer cancel()
	command := exec.CommandContext(ctx, s.path, args...)
	command.Stdin = strings.NewReader("GET " + peers.Small + " HTTP/1.1\r\nHost: " + harness.SiteName + "\r\nConnection: close\r\n\r\n")
	output, err := command.CombinedOutput()
	switch {
	case bytes.Contains(output, peers.Body(peers.Small)):
		// After a handshake that broke it says "New", too, if it had a session.
		s.counts.handshake(offered, bytes.Contains(output, []byte("\nReused, TLSv1")))
		// With TLS 1.2 it keeps the ticket that was accepted.
		if err := os.Rename(next, session); err != nil && !(offered && errors.Is(err, fs.ErrNotExist)) {
			return err
		}
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case bytes.Contains(output, []byte(" 200 OK")), bytes.Contains(output, []byte("verify error")), bytes.Contains(output, []byte("alert")):
		return fmt.Errorf("s_client: %w: %s", err, output)
	}
	s.counts.broken.Add(1)
	return nil
}

// curl is one process that makes many connections, since its sessions live as
// long as it does. It speaks TLS 1.3: with OpenSSL and TLS 1.2 it takes no tickets
// (it sets SSL_OP_NO_TICKET).
type curl struct {
	path, roots string
	counts      *counts
}

// Bounds of a curl process.
const (
	curlRequests = 30
	curlRate     = "3/s"
)

// visits makes curlRequests requests, each on a connection of its own.
func (c *curl) visits(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, patience+visitTimeout)
	defer cancel()
	args := []string{
		"--tlsv1.3", "--verbose", "--silent", "--show-error", "--http1.1", "--header", "Connection: close", "--cacert", c.roots,
		"--connect-to", "::" + address, "--rate", curlRate, "--max-time", "60",
		"--retry", "100", "--retry-all-errors", "--retry-delay", "1",
		"--output", os.DevNull, "--write-out", "%{http_code}\\n",
		fmt.Sprintf("https://%s%s?[1-%d]", harness.SiteName, peers.Small, curlRequests),
	}
	command := exec.CommandContext(ctx, c.path, args...)
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	err := command.Run()
	c.read(stderr.String())
	if err != nil {
		return errors.Join(fmt.Errorf("curl: %w\n%s", err, tail(stderr.String())), ctx.Err())
	}
	if done := strings.Count(stdout.String(), "200\n"); done != curlRequests {
		return fmt.Errorf("curl: %d of %d requests succeeded:\n%s", done, curlRequests, tail(stderr.String()))
	}
	return nil
}

// read counts the handshakes in what --verbose prints. A server that resumes
// sends no certificate.
func (c *curl) read(verbose string) {
	var connecting, offered, certificate bool
	for line := range strings.Lines(verbose) {
		switch {
		case strings.HasPrefix(line, "* Connected to "):
			if connecting {
				c.counts.broken.Add(1)
			}
			connecting, offered, certificate = true, false, false
		case strings.Contains(line, "SSL re-using session ID"), strings.Contains(line, "SSL reusing session ID"):
			offered = true
		case strings.Contains(line, "(IN), TLS handshake, Certificate (11)"):
			certificate = true
		case strings.HasPrefix(line, "* SSL connection using "):
			c.counts.handshake(offered, !certificate)
			connecting = false
		}
	}
	if connecting {
		c.counts.broken.Add(1)
	}
}

func tail(text string) string { return text[max(0, len(text)-4000):] }
