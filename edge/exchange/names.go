package exchange

import "strings"

// Name tells the field names apart that mean something to the protocol itself.
type Name int8

// Names that are known. From Connection on they are hop-by-hop: of one
// connection alone (RFC 9110 section 7.6.1).
const (
	OtherName Name = iota
	Host
	ContentLength
	Expect
	Connection
	TE
	Trailer // announces what only the framing of a message can carry
	TransferEncoding
	Upgrade
	// Hop is another one that stays on its connection: Keep-Alive, HTTP2-Settings,
	// Proxy-Connection, Proxy-Authenticate and Proxy-Authorization.
	Hop
)

// NameOf looks a name up, whatever its case. It allocates nothing.
func NameOf(name string) Name {
	switch len(name) {
	case 2:
		return known(name, "te", TE)
	case 4:
		return known(name, "host", Host)
	case 6:
		return known(name, "expect", Expect)
	case 7:
		return known(name, "trailer", Trailer) | known(name, "upgrade", Upgrade)
	case 10:
		return known(name, "connection", Connection) | known(name, "keep-alive", Hop)
	case 14:
		return known(name, "content-length", ContentLength) | known(name, "http2-settings", Hop)
	case 16:
		return known(name, "proxy-connection", Hop)
	case 17:
		return known(name, "transfer-encoding", TransferEncoding)
	case 18:
		return known(name, "proxy-authenticate", Hop)
	case 19:
		return known(name, "proxy-authorization", Hop)
	}
	return OtherName
}

// known is is if name is lower, and otherwise 0.
func known(name, lower string, is Name) Name {
	if name[0]|0x20 == lower[0] && strings.EqualFold(name, lower) {
		return is
	}
	return OtherName
}

// HopByHop reports whether fields of that name stay on their connection.
func (n Name) HopByHop() bool { return n >= Connection }

// endToEnd can't be taken away by naming them in Connection: that would let a
// client strip what backends rely on.
var endToEnd = [...]string{
	"host", "content-length", "authorization", "cookie", "forwarded",
	"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port",
}

// Removable reports whether a field is removed for being named in Connection.
func Removable(name string) bool {
	for _, kept := range endToEnd {
		if strings.EqualFold(name, kept) {
			return false
		}
	}
	return name != ""
}

// ValidUpgrade reports whether a client may ask to switch to a protocol, the value
// of Upgrade. Another version of HTTP is not one: it would carry requests past the
// routes.
func ValidUpgrade(protocol string) bool {
	lower := strings.ToLower(protocol)
	return protocol != "" && lower != "h2c" && lower != "h2" && !strings.HasPrefix(lower, "http/") &&
		!strings.ContainsFunc(protocol, func(r rune) bool { return r <= ' ' || r > '~' || r == ',' })
}
