package frontend

import (
	"crypto/tls"
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// maxLogged bounds texts of clients in the access log, in bytes.
const maxLogged = 1024

// log writes a request's record, or that of a connection of protocol tls. The query
// is left out: it may hold secrets.
func (q *request) log(duration time.Duration) {
	c := q.client
	out := c.slot.frontend.cfg.AccessLog
	if out == nil {
		return
	}
	r := record(c.lane.record[:0])
	r = append(r, `{"time":"`...)
	r = q.started.Add(duration).AppendFormat(r, time.RFC3339Nano)
	r = append(r, `","level":"INFO"`...)
	message := "request"
	if q.raw {
		message = "connection"
	}
	r.text("msg", message)
	r.text("listener", c.slot.name)
	r.text("peer", "")
	r = c.source.AppendTo(r[:len(r)-1])
	r = append(r, '"')
	r.text("sni", c.serverName)
	r.text("tls_version", versionLabel(c.version))
	r.boolean("resumed", c.resumed)
	if c.certificate != nil {
		r.text("client_subject", c.certificate.subject)
		r.text("client_cert_sha256", c.certificate.fingerprint)
	}
	if q.raw {
		r.text("protocol", "tls")
	} else {
		path, _, _ := strings.Cut(q.head.Target, "?")
		r.text("method", q.head.Method)
		r.text("host", q.authority)
		r.text("path", path)
		r.text("protocol", q.version.String())
	}
	r.text("route", q.match.Route)
	r.text("pool", q.match.Pool)
	r.number("status", int64(q.status))
	r.text("reason", q.reason)
	r.text("backend_endpoint", q.x.Endpoint)
	r.text("backend_protocol", q.x.Protocol)
	r.boolean("backend_reused", q.x.Reused)
	r.boolean("backend_resumed", q.x.Resumed)
	r.text("backend_tls_version", versionLabel(q.x.TLSVersion))
	r.number("attempts", int64(q.x.Attempts))
	r.milliseconds("backend_connect_ms", q.x.Connect)
	if q.err != nil {
		r.text("error", q.err.Error())
	}
	r.number("bytes_in", q.in)
	r.number("bytes_out", q.out)
	r.milliseconds("duration_ms", duration)
	r = append(r, "}\n"...)
	_, _ = out.Write(r) // which neither waits nor fails
	c.lane.record = r
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

// record is a line of JSON that is being written.
type record []byte

func (r *record) name(name string) {
	*r = append(*r, ',', '"')
	*r = append(*r, name...)
	*r = append(*r, '"', ':')
}

func (r *record) text(name, value string) {
	r.name(name)
	value = bounded(value)
	for i := range len(value) {
		if c := value[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, _ := json.Marshal(value) // a string always can be
			*r = append(*r, quoted...)
			return
		}
	}
	*r = append(*r, '"')
	*r = append(*r, value...)
	*r = append(*r, '"')
}

func bounded(text string) string {
	if len(text) <= maxLogged {
		return text
	}
	return strings.ToValidUTF8(text[:maxLogged], "") + "…"
}

func (r *record) number(name string, value int64) {
	r.name(name)
	*r = strconv.AppendInt(*r, value, 10)
}

func (r *record) boolean(name string, value bool) {
	r.name(name)
	*r = strconv.AppendBool(*r, value)
}

func (r *record) milliseconds(name string, d time.Duration) {
	r.name(name)
	*r = strconv.AppendFloat(*r, float64(d.Microseconds())/1000, 'f', -1, 64)
}
