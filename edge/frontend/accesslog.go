package frontend

import (
	"context"
	"crypto/tls"
	"log/slog"
	"strings"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// maxLogged bounds texts of clients in the access log, in bytes.
const maxLogged = 1024

// log writes a request's record. The query is left out: it may hold secrets.
func (q *request) log(duration time.Duration) {
	logger := q.handler.generation.slot.frontend.cfg.AccessLog
	if logger == nil {
		return
	}
	in := q.received
	if q.body != nil {
		in += q.body.bytes.Load()
	}
	fields := append(q.client.logFields(),
		slog.String("method", bounded(q.r.Method)),
		slog.String("host", bounded(q.r.Host)),
		slog.String("path", bounded(q.r.URL.EscapedPath())),
		slog.String("protocol", q.r.Proto),
	)
	fields = append(fields, exchangeFields(q.match, &q.x, q.status, q.reason, q.err)...)
	fields = append(fields, slog.Int64("bytes_in", in), slog.Int64("bytes_out", q.sent), milliseconds("duration_ms", duration))
	logger.LogAttrs(context.Background(), slog.LevelInfo, "request", fields...)
}

// logTunnel writes the record of a connection of protocol tls.
func (s *slot) logTunnel(c *clientConn, t *tunnelRecord, duration time.Duration) {
	logger := s.frontend.cfg.AccessLog
	if logger == nil {
		return
	}
	fields := append(c.logFields(), slog.String("protocol", "tls"))
	fields = append(fields, exchangeFields(t.match, &t.x, t.status, t.reason, t.err)...)
	fields = append(fields, slog.Int64("bytes_in", t.in), slog.Int64("bytes_out", t.out), milliseconds("duration_ms", duration))
	logger.LogAttrs(context.Background(), slog.LevelInfo, "connection", fields...)
}

func (c *clientConn) logFields() []slog.Attr {
	fields := []slog.Attr{
		slog.String("listener", c.slot.name),
		slog.String("peer", c.source.String()),
		slog.String("sni", bounded(c.tls.ServerName)),
		slog.String("tls_version", versionLabel(c.tls.Version)),
		slog.Bool("resumed", c.tls.DidResume),
	}
	if c.certificate != nil {
		fields = append(fields, slog.String("client_subject", bounded(c.certificate.subject)),
			slog.String("client_cert_sha256", c.certificate.fingerprint))
	}
	return fields
}

func exchangeFields(match exchange.Match, x *exchange.Exchange, status int, reason string, err error) []slog.Attr {
	fields := []slog.Attr{
		slog.String("route", match.Route),
		slog.String("pool", match.Pool),
		slog.Int("status", status),
		slog.String("reason", reason),
		slog.String("backend_endpoint", x.Endpoint),
		slog.String("backend_protocol", x.Protocol),
		slog.Bool("backend_reused", x.Reused),
		slog.Bool("backend_resumed", x.Resumed),
		slog.String("backend_tls_version", versionLabel(x.TLSVersion)),
		slog.Int("attempts", x.Attempts),
		milliseconds("backend_connect_ms", x.Connect),
	}
	if err != nil {
		fields = append(fields, slog.String("error", bounded(err.Error())))
	}
	return fields
}

// versionLabel is a TLS version as it stands in manifests.
func versionLabel(version uint16) string {
	switch version {
	case tls.VersionTLS12:
		return "tls1.2"
	case tls.VersionTLS13:
		return "tls1.3"
	default:
		return ""
	}
}

func milliseconds(key string, d time.Duration) slog.Attr {
	return slog.Float64(key, float64(d.Microseconds())/1000)
}

func bounded(s string) string {
	if len(s) <= maxLogged {
		return s
	}
	return strings.ToValidUTF8(s[:maxLogged], "") + "…"
}
