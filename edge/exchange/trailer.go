package exchange

import (
	"net/http"

	"golang.org/x/net/http/httpguts"

	"github.com/reseal/reseal/proto/rules"
)

// TrailerAllowed reports whether a field may stand in a trailer section, in
// either direction. Fields that frame or route a message, that authenticate,
// that modify a request, or that control what becomes of a response are only
// meant for the header (RFC 9110 section 6.5.1): whoever reads them from a
// trailer gets around whoever checked the header. The same holds for the fields
// by which proxies tell about the client. name may have any case.
func TrailerAllowed(name string) bool {
	name = http.CanonicalHeaderKey(name)
	if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidTrailerHeader(name) || headerOnly[name] {
		return false
	}
	return !rules.NamesClient(name)
}

// headerOnly are those that httpguts.ValidTrailerHeader doesn't know.
var headerOnly = map[string]bool{
	"Accept": true, "Accept-Encoding": true, "Age": true, "Cookie": true, "Date": true, "Expires": true,
	"Http2-Settings": true, "Location": true, "Proxy-Authenticate": true, "Proxy-Authorization": true,
	"Proxy-Connection": true, "Retry-After": true, "Set-Cookie": true, "Upgrade": true, "Vary": true, "Via": true, "Warning": true,
}
